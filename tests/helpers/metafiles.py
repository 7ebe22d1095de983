"""The entries of the metafiles, by config."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def metafiles():
    """The parsed metafiles that model-index.yml names, by their paths."""
    paths = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    return {path: yaml.safe_load((ROOT / path).read_text()) for path in paths}


def entries():
    """Each model's entry by its config, such as ``gcvit/gcvit_t_imagenet.py``."""
    models = [model for metafile in metafiles().values() for model in metafile['Models']]
    return {model['Config'].removeprefix('configs/'): model for model in models}
