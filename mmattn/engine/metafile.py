"""Entries of ``metafile.yml``, the one place of published results and of the weights' addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

METAFILE = 'metafile.yml'


def entries(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Models of a folder's metafile by name; none where the folder has no metafile."""
    path = Path(folder, METAFILE)
    if not path.is_file():
        return {}
    models = yaml.safe_load(path.read_text(encoding='utf-8'))['Models']
    return {model['Name']: model for model in models}


def entry_of(config: str | Path) -> dict[str, Any] | None:
    """Entry of a config file in the metafile beside it or in the folder above (ablations).

    Returns:
        The entry, or None where no metafile describes this config.
    """
    path = Path(config).resolve()
    for folder in (path.parent, path.parent.parent):
        inside = path.relative_to(folder).parts
        for model in entries(folder).values():
            # 'configs/gcvit/ablations/x.py': the metafile's folder is the second part.
            if Path(model['Config']).parts[2:] == inside:
                return model
    return None


def weights_of(config: str | Path) -> str | None:
    """Address of the published weights behind a config's published results, or None."""
    return (entry_of(config) or {}).get('Weights')
