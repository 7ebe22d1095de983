import pytest


def pytest_addoption(parser):
    parser.addoption(
        '--fuzz', type=int, default=500, help='random cases for each operator [%(default)s]'
    )


@pytest.fixture
def fuzz_seeds(request):
    """One seed for each random case."""
    return range(request.config.getoption('--fuzz'))
