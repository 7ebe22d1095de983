"""Contents of the sdist and the wheel: all that is needed, and no leftovers."""

import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

import mmattn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('mmattn', 'benchmarks', 'configs', 'docs', 'requirements', 'tests', 'tools')
FILES = (
    *(
        'CHANGELOG.md',
        'CITATION.cff',
        'CONTRIBUTING.md',
        'LICENSE',
        'MANIFEST.in',
        'Makefile',
        'README.md',
        'mmattn_configs.py',
        'mkdocs.yml',
    ),
    *('model-index.yml', 'pyproject.toml', 'setup.py'),
)
# Leftovers of work in a tree, which must not be packed.
LEFTOVERS = (
    'mmattn/__pycache__/gone.cpython-311.pyc',
    'mmattn/ops/_cuda.so',
    'mmattn/.mim/configs/gone.py',
    'configs/gcvit/__pycache__/gone.cpython-311.pyc',
    'tools/misc/__pycache__/gone.cpython-311.pyc',
    'build/lib.linux-x86_64-cpython-311/mmattn/gone.py',
    'mmattn.egg-info/SOURCES.txt',
    'work_dirs/run/epoch_1.pth',
)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the files to be packed, since setuptools leaves folders beside them."""
    folder = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('__pycache__', '.mim', '*.so')
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope='module')
def packed(source):
    """Paths in the working tree of the files to be packed."""
    found = (str(path.relative_to(source)) for path in source.rglob('*') if path.is_file())
    return sorted(set(found) - set(LEFTOVERS))


@pytest.fixture(scope='module')
def distributions(request, source, packed, tmp_path_factory):
    """Folder with sdist and wheel: that of --distributions, or built here."""
    if folder := request.config.getoption('--distributions'):
        return Path(folder)
    for name in LEFTOVERS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('left over')
    folder = tmp_path_factory.mktemp('dist')
    # Makes the wheel from the sdist. Optimization and CUDA would take minutes.
    subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source],
        check=True,
        env=os.environ | {'CXXFLAGS': '-O0', 'MMATTN_CUDA': '0'},
    )
    return folder


@pytest.fixture(scope='module')
def sdist(distributions):
    (path,) = distributions.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        yield archive


@pytest.fixture(scope='module')
def wheel(distributions):
    (path,) = distributions.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


def home_in_the_wheel(path):
    """Path in the wheel of a file of the working tree, or None."""
    top, *rest = PurePosixPath(path).parts
    if top == 'mmattn' and path.endswith(('.py', '.html', 'py.typed')):
        return path
    if path == 'mmattn_configs.py':
        return path
    if top in ('configs', 'model-index.yml') or (top == 'tools' and rest[-1] != 'benchmark.py'):
        return f'mmattn/.mim/{path}'
    return None


def test_the_sdist_holds_what_is_needed_to_build_and_test(sdist, packed):
    (top,) = {PurePosixPath(name).parts[0] for name in sdist.getnames()}
    assert top == f'mmattn-{mmattn.__version__}'
    found = {
        name.removeprefix(f'{top}/') for name in sdist.getnames() if sdist.getmember(name).isfile()
    }
    made = {name for name in found if name.startswith('mmattn.egg-info/')} | {
        'PKG-INFO',
        'setup.cfg',
    }
    assert found - made == set(packed)


def test_the_wheel_holds_what_is_used_and_nothing_else(wheel, packed, pytestconfig):
    information = f'mmattn-{mmattn.__version__}.dist-info'
    expected = set(filter(None, map(home_in_the_wheel, packed)))
    names = ('METADATA', 'RECORD', 'WHEEL', 'licenses/LICENSE', 'top_level.txt', 'entry_points.txt')
    expected |= {f'{information}/{name}' for name in names}
    x86 = platform.machine() in ('x86_64', 'AMD64')
    for name in ('default', *(('avx2', 'avx512') if x86 else ())):
        expected.add(f'mmattn/ops/_cpu_{name}.so')
    if pytestconfig.getoption('--distributions') and shutil.which('nvcc'):
        expected.add('mmattn/ops/_cuda.so')
    assert set(wheel.namelist()) == expected


def test_files_in_the_wheel_are_unchanged(wheel, packed, source):
    for path in packed:
        home = home_in_the_wheel(path)
        if home is None:
            continue
        assert wheel.read(home) == (source / path).read_bytes(), path
        executable = (source / path).stat().st_mode & stat.S_IXUSR
        assert wheel.getinfo(home).external_attr >> 16 & stat.S_IXUSR == executable, path


def test_the_wheel_is_for_every_python_and_names_both_stacks(wheel):
    assert '-cp310-abi3-' in wheel.filename
    information = f'mmattn-{mmattn.__version__}.dist-info'
    metadata = message_from_bytes(wheel.read(f'{information}/METADATA'))
    assert metadata['Requires-Python'] == '>=3.10'
    assert {'onedl', 'openmmlab'} <= set(metadata.get_all('Provides-Extra'))


def test_an_editable_install_copies_the_entry_point(source, tmp_path):
    """Or a deleted working tree would leave an entry point without its module."""
    code = f'from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})'
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns('build', '*.egg-info'))
    no_compiler = os.environ | {'CXX': 'false', 'MMATTN_CUDA': '0'}
    subprocess.run([sys.executable, '-c', code], cwd=tree, env=no_compiler, check=True)
    (path,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        assert archive.read('mmattn_configs.py') == (ROOT / 'mmattn_configs.py').read_bytes()
