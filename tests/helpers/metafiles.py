"""Models of the metafiles."""

from model_zoo import metafiles


def entries():
    """Entries of the models by config, such as ``gcvit/gcvit_t_imagenet.py``."""
    models = [model for metafile in metafiles().values() for model in metafile['Models']]
    return {model['Config'].removeprefix('configs/'): model for model in models}
