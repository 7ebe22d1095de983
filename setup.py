"""The one step that pyproject.toml cannot express: configs/ belongs inside the package.

OpenMMLab's tools look for the configs of a package in ``<package>/.mim/configs``; that is how
``_base_ = 'mmattn::...'`` finds them. A wheel gets a copy; an editable install gets a link, so that
it always shows the configs of the working tree.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            link = ROOT / 'mmattn' / '.mim' / 'configs'
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path('..', '..', 'configs'))
        else:
            shutil.copytree(
                ROOT / 'configs',
                Path(self.build_lib, 'mmattn', '.mim', 'configs'),
                ignore=shutil.ignore_patterns('__pycache__'),
                dirs_exist_ok=True,
            )


setup(cmdclass={'build_py': BuildWithConfigs})
