import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture(scope='session')
def load_tool():
    """Load a script of tools/ as a module, by its path without suffix: ``deployment/export``."""

    def load(name):
        module_name = f'mmattn_tools_{name.replace("/", "_")}'
        spec = importlib.util.spec_from_file_location(module_name, TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
