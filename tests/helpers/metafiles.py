"""The models of the metafiles, by config."""

from model_zoo import metafiles


def entries():
    """Each model's entry by its config, such as ``gcvit/gcvit_t_imagenet.py``."""
    models = [model for metafile in metafiles().values() for model in metafile['Models']]
    return {model['Config'].removeprefix('configs/'): model for model in models}
