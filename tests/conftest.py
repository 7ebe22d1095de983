import zipfile
from pathlib import Path

import pytest
from helpers import network
from helpers.runs import forget_runs

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
    network.close()
    wheel = config.getoption('--installed')
    if wheel and (difference := difference_from(wheel)):
        raise pytest.UsageError(f'the mmattn that is imported is not {wheel}: {difference}')


def difference_from(wheel):
    """A difference between the imported mmattn and the wheel, or None."""
    site = Path(mmattn.__file__).parents[1]
    if site.name != 'site-packages':
        return f'it lies in {site}'
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # pip rewrites RECORD.
            if not name.endswith('/RECORD') and (site / name).read_bytes() != archive.read(name):
                return f'{site / name} differs'
    return None


def pytest_report_header():
    """Versions and operators under test."""
    names = ['torch', *(name for pair in OPENMMLAB.values() for name in pair)]
    versions = ', '.join(f'{name} {version}' for name, version in installed(names).items())
    return [
        f'mmattn {mmattn.__version__} in {Path(mmattn.__file__).parent}; with {versions}',
        f'operators: {mmattn.ops.backend_report()}'.replace('\n', '; '),
    ]


@pytest.fixture(autouse=True)
def fresh_mmengine():
    """Forget scopes, loggers and visualizers after each test: mmengine keeps them per process."""
    yield
    forget_runs()


@pytest.fixture
def fuzz_seeds(request):
    """One seed for each random case."""
    return range(request.config.getoption('--fuzz'))


@pytest.fixture
def backend(request, monkeypatch):
    """The implementation of the operators: a value of MMATTN_OPS."""
    monkeypatch.setenv('MMATTN_OPS', request.param)


def pytest_generate_tests(metafunc):
    """Run tests of attention and backbones on the compiled operators and on the reference.

    Tests marked ``no_backend`` run once.
    """
    test = metafunc.definition
    built_on_operators = test.path.parent.name in ('attention', 'backbones')
    if built_on_operators and not test.get_closest_marker('no_backend'):
        metafunc.fixturenames.append('backend')
        metafunc.parametrize('backend', ['compiled', 'reference'], indirect=True)
