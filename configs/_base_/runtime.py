# Registers the backbones, whichever tool reads the config.
custom_imports = dict(imports=['mmattn'], allow_failed_imports=False)
