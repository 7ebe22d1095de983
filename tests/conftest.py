import pytest


def pytest_addoption(parser):
    parser.addoption(
        '--fuzz', type=int, default=500, help='random cases for each operator [%(default)s]'
    )


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
