"""What mmattn needs, in one table, and the sentence that says what is missing.

Only the standard library is used: this file has to work where everything else is broken.

mmengine, mmcv and the task packages come under two distribution names (OpenMMLab's own releases and
the maintained onedl forks) with the same import names. A package cannot require "one of the two", so
`mmattn` requires neither by name and looks at import time instead.
"""

import importlib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Dependency:
    """A module that `import mmattn` needs, and the least version that was tried."""

    module: str
    minimum: str


@dataclass(frozen=True)
class OpenMMLabPackage:
    """One import name under its two distributions, each with the requirement that mmattn states."""

    module: str
    onedl: str
    upstream: str
    onedl_requirement: str
    upstream_requirement: str


REMEDY = '; `python -m mmattn.doctor` prints the command that mends this'

IMPORTED = (
    Dependency('torch', '2.10'),
    Dependency('numpy', '1.26'),
    Dependency('mmengine', '0.10.7'),
    Dependency('mmcv', '2.1.0'),
)

OPENMMLAB = (
    OpenMMLabPackage('mmengine', 'onedl-mmengine', 'mmengine', '>=0.10.12', '>=0.10.7'),
    OpenMMLabPackage('mmcv', 'onedl-mmcv', 'mmcv', '>=2.3.6', '==2.1.0'),
    OpenMMLabPackage('mmdet', 'onedl-mmdetection', 'mmdet', '>=3.5.1', '==3.3.0'),
    OpenMMLabPackage('mmseg', 'onedl-mmsegmentation', 'mmsegmentation', '>=1.4.2', '==1.2.2'),
    OpenMMLabPackage('mmpretrain', 'onedl-mmpretrain', 'mmpretrain', '>=1.3.6', '==1.2.0'),
)


def release(version):
    """The leading numbers of a version: ``'2.13.0+cpu'`` is ``(2, 13, 0)``."""
    numbers = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(number) for number in numbers.group().split('.')) if numbers else ()


def at_least(version, minimum):
    """Whether `version` is `minimum` or newer, by their leading numbers."""
    return release(version) >= release(minimum)


def check_dependencies(dependencies=IMPORTED):
    """Import every dependency and look at its version.

    Raises:
        ImportError: one sentence with the first package that is missing, broken or too old, what was
            found, what is needed, and where the remedy is.
    """
    for dependency in dependencies:
        need = f'mmattn needs {dependency.module} >= {dependency.minimum}'
        try:
            found = importlib.import_module(dependency.module).__version__
        # A library that does not load raises OSError, a combination that is refused AssertionError.
        except (ImportError, OSError, AssertionError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == dependency.module:
                raise ImportError(f'{need}, and it is not installed{REMEDY}') from None
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise ImportError(f'{need}, and it does not import ({reason}){REMEDY}') from error
        if not at_least(found, dependency.minimum):
            raise ImportError(f'{need}, and found {found}{REMEDY}')
