"""Lets ``_base_ = 'mmattn::gcvit/...'`` work in the tools of mmengine, mmdet, mmseg and mmpretrain as they are.

These read a config before they import what it names, and mmengine knows the configs of the packages in
a table of its own alone. So `register` has to run before ``import mmattn`` does: torch calls it at the
end of its own import, by the entry point in the group ``torch.backends`` (TORCH_DEVICE_BACKEND_AUTOLOAD=0
switches that off), and so does mmattn. It stands outside the package, whose import takes seconds, and
uses nothing but the standard library.
"""

import difflib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

READER = 'mmengine.config.config'


def register():
    """Let mmengine find our configs, now or as soon as it is imported; a second call does nothing."""
    reader = sys.modules.get(READER)
    if hasattr(reader, 'Config'):
        extend(reader)
    elif not any(isinstance(finder, ReaderFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ReaderFinder())


def extend(reader):
    """Teach mmengine's module `reader` what ``mmattn::`` means, and mmseg's second distribution name."""
    config = reader.Config
    try:
        from mmengine.config.utils import MODULE2PACKAGE

        find = config._get_cfg_path
    except (AttributeError, ImportError) as error:
        # This runs in the middle of somebody's import of torch or mmengine, which it must not break.
        warnings.warn(
            f"'mmattn::' will not work in configs, by this mmengine: {error}", stacklevel=2
        )
        return
    if find.__module__ == __name__:
        return

    # By its import name mmseg is found under either distribution (the table says mmsegmentation).
    MODULE2PACKAGE.update(mmattn='mmattn', mmseg='mmseg')

    def find_with_ours(cfg_path, filename):
        package, _, name = cfg_path.partition('::')
        if package != 'mmattn':
            return find(cfg_path, filename)
        # No scope: mmengine would look for all modules of the config among mmattn's own, but the heads
        # are mmdet's, mmseg's or mmpretrain's, as the config's default_scope says.
        return str(config_path(name)), None

    config._get_cfg_path = staticmethod(find_with_ours)


def config_path(name):
    """The file of the config `name`, for example ``gcvit/mask_rcnn_gcvit_t_coco.py``.

    Raises:
        FileNotFoundError: there is none, or mmattn is not installed; it names similar ones.
    """
    folder = Path(find_spec('mmattn').origin).parent / '.mim' / 'configs'
    path = folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} does not exist: mmattn has to be installed with pip')
    if not path.is_file():
        known = [str(file.relative_to(folder)) for file in folder.rglob('*.py')]
        similar = ', '.join(difflib.get_close_matches(name, known, n=3)) or 'none'
        raise FileNotFoundError(f'mmattn has no config {name} in {folder}; similar: {similar}')
    return path


class ReaderFinder(MetaPathFinder):
    """Finds mmengine's config reader, and sees to it that it is extended when it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != READER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = ReaderLoader(spec.loader.name, spec.loader.path)
        return spec


class ReaderLoader(SourceFileLoader):
    """Loads the reader, and extends it."""

    def exec_module(self, module):
        super().exec_module(module)
        extend(module)
