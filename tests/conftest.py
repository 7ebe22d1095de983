import zipfile
from pathlib import Path

import pytest

import mmattn
from mmattn._dependencies import OPENMMLAB, installed


def pytest_addoption(parser):
    parser.addoption(
        '--fuzz', type=int, default=500, help='random cases for each operator [%(default)s]'
    )
    parser.addoption(
        '--distributions', metavar='DIR', help='look into the sdist and wheel there, build none'
    )
    parser.addoption(
        '--installed', metavar='WHEEL', help='refuse to test anything but this wheel, installed'
    )


def pytest_configure(config):
    wheel = config.getoption('--installed')
    if wheel and (difference := difference_from(wheel)):
        raise pytest.UsageError(f'the mmattn that is imported is not {wheel}: {difference}')


def difference_from(wheel):
    """What shows that the imported mmattn was not installed from this wheel, or None."""
    site = Path(mmattn.__file__).parents[1]
    if site.name != 'site-packages':
        return f'it lies in {site}'
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # pip writes a RECORD of its own.
            if not name.endswith('/RECORD') and (site / name).read_bytes() != archive.read(name):
                return f'{site / name} differs'
    return None


def pytest_report_header():
    """The stack that is tested."""
    names = ['torch', *(name for pair in OPENMMLAB.values() for name in pair)]
    versions = ', '.join(f'{name} {version}' for name, version in installed(names).items())
    return [
        f'mmattn {mmattn.__version__} in {Path(mmattn.__file__).parent}; with {versions}',
        f'operators: {mmattn.ops.backend_report()}'.replace('\n', '; '),
    ]


@pytest.fixture
def fuzz_seeds(request):
    """One seed for each random case."""
    return range(request.config.getoption('--fuzz'))


@pytest.fixture
def backend(request, monkeypatch):
    """The implementation that serves the operators, a value of MMATTN_OPS."""
    monkeypatch.setenv('MMATTN_OPS', request.param)


def pytest_generate_tests(metafunc):
    """What is built on the operators is tested on the compiled ones and on the literal definitions."""
    if metafunc.definition.path.parent.name in ('attention', 'backbones'):
        metafunc.fixturenames.append('backend')
        metafunc.parametrize('backend', ['compiled', 'reference'], indirect=True)
