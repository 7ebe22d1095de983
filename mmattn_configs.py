"""Let mmengine read ``_base_ = 'mmattn::...'`` in stock tools.

Stock tools read a config before they import what it names, and mmengine has a fixed table of
packages. So torch calls `register` at the end of its import, by the entry point in the group
``torch.backends`` (TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off), and mmattn calls it, too. It
extends mmengine's reader once that is imported.

This runs during the user's import of torch or mmengine, so every error here becomes a warning. The
module is outside the package, whose import takes seconds, and imports only the standard library. An
editable install has a copy of this file, so that torch can be imported without the working tree.
"""

import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

READER = 'mmengine.config.config'


def register() -> None:
    """Extend mmengine's reader now or when it is imported; a second call does nothing."""
    try:
        reader = sys.modules.get(READER)
        if hasattr(reader, 'Config'):
            extend(reader)
        elif not any(isinstance(finder, ReaderFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, ReaderFinder())
    except Exception as error:
        warn(error)


def warn(error: Exception) -> None:
    """Warn that ``mmattn::`` does not work; never raises, also where warnings are errors."""
    message = f"'mmattn::' will not work in configs: {type(error).__name__}: {error}"
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        print(f'mmattn: {message}', file=sys.stderr)


def extend(reader: Any) -> None:
    """Add the package name mmattn, and mmseg's second distribution, to mmengine's `reader`."""
    try:
        from mmengine.config.utils import MODULE2PACKAGE

        find = reader.Config._get_cfg_path
        if find.__module__ == __name__:
            return

        def find_with_ours(cfg_path: str, *rest: Any) -> Any:
            package, _, name = cfg_path.partition('::')
            if package != 'mmattn':
                return find(cfg_path, *rest)
            # No scope: mmengine would look for all modules of the config in mmattn, but the heads
            # are in mmdet, mmseg or mmpretrain, which the config's default_scope names.
            return str(config_path(name)), None

        # By its import name, mmseg is found under either distribution name.
        MODULE2PACKAGE.update(mmattn='mmattn', mmseg='mmseg')
        reader.Config._get_cfg_path = staticmethod(find_with_ours)
    except Exception as error:
        warn(error)


def config_path(name: str) -> Path:
    """Return the path of the config `name`, for example ``gcvit/mask_rcnn_gcvit_t_coco.py``.

    Raises:
        FileNotFoundError: there is none, or mmattn is not installed; it names similar ones.
    """
    package = find_spec('mmattn')
    if package is None or package.origin is None:
        raise FileNotFoundError(f'no config mmattn::{name}: mmattn is removed, install it again')
    folder = Path(package.origin).parent / '.mim' / 'configs'
    path = folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} does not exist: mmattn has to be installed with pip')
    if not path.is_file():
        import difflib

        known = [str(file.relative_to(folder)) for file in folder.rglob('*.py')]
        similar = ', '.join(difflib.get_close_matches(name, known, n=3)) or 'none'
        raise FileNotFoundError(f'mmattn has no config {name} in {folder}; similar: {similar}')
    return path


class ReaderFinder(MetaPathFinder):
    """Finder that extends mmengine's reader when that is imported, and then removes itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != READER:
            return None
        if self in sys.meta_path:  # not so in a second thread
            sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        try:
            load = spec.loader.exec_module

            def load_and_extend(module: Any) -> None:
                load(module)
                extend(module)

            spec.loader.exec_module = load_and_extend
        except Exception as error:
            warn(error)
        return spec
