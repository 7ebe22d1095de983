"""Triton kernels without a GPU: values by the interpreter, compilation for three GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import triton_cases

ROOT = Path(__file__).parents[2]
VALUES = [
    *(f'window-{name}' for name in triton_cases.WINDOWS),
    *(f'deformed-{name}' for name in triton_cases.DEFORMED),
    'large-table',
    'repeated',
    'registered',
]


class Run:
    """Process that runs cases; the first ``check`` waits for its end."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, triton_cases.__file__, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.results = None

    def check(self, name):
        if self.results is None:
            out, self.error = self.process.communicate()
            self.results = dict(json.loads(line) for line in out.splitlines())
        assert name in self.results, self.error
        assert self.results[name] is None, self.results[name]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    if importlib.util.find_spec('triton') is None:
        pytest.fail(
            'triton is not installed, and the kernels in it are untested: pip install triton'
        )
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    path = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / 'tests'), environment.get('PYTHONPATH')))
    )
    # A fresh cache: programs of an earlier run would hide errors of this one.
    cache = str(tmp_path_factory.mktemp('triton'))
    environment |= dict(PYTHONPATH=path, TRITON_CACHE_DIR=cache, OMP_NUM_THREADS='1')
    started = {'values': Run('values', **environment, TRITON_INTERPRET='1')}
    for architecture in triton_cases.ARCHITECTURES:
        started[architecture] = Run('compile', str(architecture), **environment)
    yield started
    for run in started.values():
        run.process.kill()
        run.process.wait()


# bfloat16 is only compiled, below: the interpreter's tl.dot is wrong for it (Triton 3.7.1).
@pytest.mark.parametrize('name', VALUES)
def test_values_and_gradients_are_those_of_the_reference(runs, name):
    runs['values'].check(name)


@pytest.mark.parametrize('dtype', triton_cases.COMPILED_TYPES)
@pytest.mark.parametrize('name', triton_cases.COMPILED)
@pytest.mark.parametrize('architecture', triton_cases.ARCHITECTURES)
def test_compiles_once_for_all_sizes_in_shared_memory(runs, architecture, name, dtype):
    runs[architecture].check(f'{name}-{dtype}')
