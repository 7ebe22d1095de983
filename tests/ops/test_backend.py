"""Backends that cannot be used: the reason is reported, and nothing fails at import."""

import sys

import pytest
import torch

import mmattn.ops
from mmattn.ops import _backend


class Refuse:
    """Finder that makes `import triton` raise."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == 'triton':
            raise self.error


@pytest.mark.parametrize(
    'error',
    [
        ImportError('libtriton.so: undefined symbol'),
        RuntimeError('0 active drivers'),
        OSError('libcuda.so.1'),
        AttributeError('module triton has no attribute jit'),
    ],
)
def test_a_triton_that_raises_leaves_the_reference(error, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(_backend, '_load_library', lambda name: '')
    monkeypatch.setattr(_backend.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.delattr(mmattn.ops, 'triton', raising=False)
    for name in [*sys.modules]:
        if name.split('.')[0] == 'triton' or name.startswith('mmattn.ops.triton'):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Refuse(error), *sys.meta_path])
    problem = _backend._load_cuda().problem
    assert problem == f'triton does not import: {type(error).__name__}: {error}'


@pytest.mark.parametrize('name, file', [('_cpu_avx2.so', '_cpu.txt'), ('_cuda.so', '_cuda.txt')])
def test_the_reason_of_a_failed_build_is_reported(name, file, tmp_path, monkeypatch):
    monkeypatch.setattr(_backend, '__file__', str(tmp_path / '_backend.py'))
    assert _backend._load_library(name) == f'{name} was not built with the package'
    (tmp_path / file).write_text('g++ failed: no\n')
    assert _backend._load_library(name).endswith('with the package: g++ failed: no')
