"""The entry point that torch calls: no fault in it breaks an import."""

import os
import shutil
import subprocess
import sys

import pytest

import mmattn_configs

TORCH = 'import torch; print(torch.ones(2).sum().item())'
# mmengine's config reader, with variations.
READER = """
class Config:
    {finder}
"""
FINDER = '@staticmethod\n    def _get_cfg_path(cfg_path, filename): return cfg_path, filename'
READ = """
import mmattn_configs; mmattn_configs.register()
from mmengine.config.config import Config
print(getattr(Config, '_get_cfg_path', print)('mmdet::x.py', 'y.py'))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with only the entry point and its module, as of a half-removed mmattn."""
    shutil.copy(mmattn_configs.__file__, tmp_path)
    information = tmp_path / 'mmattn-9.dist-info'
    information.mkdir()
    (information / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmattn\nVersion: 9\n')
    entry = '[torch.backends]\nmmattn = mmattn_configs:register\n'
    (information / 'entry_points.txt').write_text(entry)
    return tmp_path


def run(code, folder, *options):
    """Run code with nothing of mmattn but the files in the folder."""
    # Hides an mmattn that is installed in site-packages.
    hidden = "import sys; sys.modules['mmattn'] = None\n"
    environment = os.environ | {'PYTHONPATH': str(folder)}
    command = [sys.executable, *options, '-c', hidden + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


# A reader that raises at the first access.
RAISES = """
class Reader:
    def __getattr__(self, name): raise RuntimeError('it breaks')
sys.modules['mmengine.config.config'] = Reader()
"""


@pytest.mark.parametrize('options', [(), ('-W', 'error::UserWarning')], ids=['', 'error'])
def test_torch_imports_where_it_raises(folder, options):
    done = run(RAISES + TORCH, folder, *options)
    assert done.stdout == '2.0\n', done.stderr
    assert "'mmattn::' will not work in configs: RuntimeError: it breaks" in done.stderr


def test_torch_imports_where_the_package_is_gone(folder):
    code = (
        TORCH + '\nfrom mmengine.config import Config\n'
        "Config._get_cfg_path('mmattn::gcvit/x.py', 'y.py')"
    )
    done = run(code, folder)
    assert done.stdout == '2.0\n'
    assert 'no config mmattn::gcvit/x.py: mmattn is removed, install it again' in done.stderr


def write_mmengine(folder, reader, utils='MODULE2PACKAGE = {}'):
    package = folder / 'mmengine/config'
    package.mkdir(parents=True)
    (package.parent / '__init__.py').touch()
    for name, text in {'__init__': '', 'config': reader, 'utils': utils}.items():
        (package / f'{name}.py').write_text(text)


@pytest.mark.parametrize(
    'finder, utils, says',
    [
        ('pass', 'MODULE2PACKAGE = {}', "has no attribute '_get_cfg_path'"),
        (FINDER, '', "cannot import name 'MODULE2PACKAGE'"),
        (FINDER, 'MODULE2PACKAGE = ()', "has no attribute 'update'"),
    ],
    ids=['renamed', 'missing', 'another kind'],
)
def test_mmengine_imports_where_it_is_another(folder, finder, utils, says):
    write_mmengine(folder, READER.format(finder=finder), utils)
    done = run(READ, folder)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr and "'mmattn::' will not work in configs" in done.stderr
    if finder == FINDER:
        assert done.stdout == "('mmdet::x.py', 'y.py')\n"


def test_what_is_not_ours_is_passed_on(folder):
    """Even with arguments that this mmengine does not have."""
    finder = FINDER.replace('filename', '*more')
    write_mmengine(folder, READER.format(finder=finder))
    done = run(READ.replace("'y.py'", '1, 2'), folder)
    assert (done.stdout, done.stderr) == ("('mmdet::x.py', 1, 2)\n", '')


def test_the_finder_removes_itself_after_the_import(folder):
    write_mmengine(folder, READER.format(finder=FINDER))
    code = 'import sys; n = len(sys.meta_path)' + READ + 'print(len(sys.meta_path) - n)'
    assert run(code, folder).stdout.splitlines()[-1] == '0'


def test_a_second_call_does_nothing():
    before = list(sys.meta_path)
    mmattn_configs.register()
    assert sys.meta_path == before
