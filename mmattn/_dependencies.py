"""Requirements of mmattn, from its own metadata, and their check at import.

Only the standard library is used: this has to run where everything else is missing or broken.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Iterable

# Import name -> distribution names: the maintained fork's (extra `onedl`), then OpenMMLab's own
# (extra `openmmlab`). Both install the same import name, and no package can require "one of two".
OPENMMLAB = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
IMPORTED = ('torch', 'numpy', 'mmengine')
REMEDY = '; `python -m mmattn.doctor` prints the command that mends this'


def requirements() -> dict[str, str]:
    """Version specifiers by distribution name, extras included; empty without an installation."""
    try:
        lines = importlib.metadata.requires('mmattn') or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r'([\w.-]+)\s*([^;\s]*)', line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version or specifier: ``'>=2.13.0+cpu'`` is ``(2, 13, 0)``."""
    numbers = re.match(r'[<>=~ ]*(\d+(?:\.\d+)*)', version)
    return tuple(int(number) for number in numbers[1].split('.')) if numbers else ()


def at_least(version: str, minimum: str) -> bool:
    """Compare leading numbers; `minimum` may be a specifier, such as ``>=2.10``."""
    return release(version) >= release(minimum)


def check_dependencies(modules: Iterable[str] = IMPORTED) -> None:
    """Import each module and compare its version with the requirement.

    Raises:
        ImportError: one sentence with the first package that is missing, broken or too old, what
            was found, what is needed, and where the remedy is.
    """
    specifiers = requirements()
    for module in modules:
        names = OPENMMLAB.get(module, (module,))
        name = next(iter(installed(names)), names[0])
        specifier = specifiers.get(name, '')
        need = f'mmattn needs {name}{specifier}'
        try:
            found = importlib.import_module(module).__version__
        # A library that does not load raises OSError, a refused combination AssertionError.
        except (ImportError, OSError, AssertionError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                raise ImportError(f'{need}, and it is not installed{REMEDY}') from None
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise ImportError(f'{need}, and it does not import ({reason}){REMEDY}') from error
        if not at_least(found, specifier):
            raise ImportError(f'{need}, and found {found}{REMEDY}')
