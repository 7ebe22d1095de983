"""Operators on a GPU against their references; skipped without a GPU, as in CI.

test_*_kernels.py and test_triton.py run and compile the same kernels without a GPU.
"""

import pytest
import torch
from helpers.comparison import DTYPES, assert_agree, exact, results, rounding
from ops import (
    test_deform_attention_kernels,
    test_deform_sample_kernels,
    test_neighborhood_kernels,
    test_quadtree_kernels,
    test_window_kernels,
)

from mmattn import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
]
DEVICE = 'cuda'

CASES = {
    'deform_attention': test_deform_attention_kernels,
    'deform_sample': test_deform_sample_kernels,
    'neighborhood_attention': test_neighborhood_kernels,
    'quadtree_level': test_quadtree_kernels,
    'window_attention': test_window_kernels,
}


@pytest.mark.parametrize('seed', range(60))
@pytest.mark.parametrize('name', CASES)
def test_kernels_equal_the_reference(name, seed, monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'compiled')
    inputs, gradients = CASES[name].case(seed), CASES[name].GRADIENTS
    there = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    actual = results(getattr(ops, name), there, gradients)
    actual = {n: t.cpu() for n, t in actual.items()}
    if name == 'quadtree_level':
        test_quadtree_kernels.check(actual, inputs, f'case {seed}')
        return
    expected = results(getattr(ops, f'{name}_reference'), exact(inputs), gradients)
    dtype = next(t.dtype for t in inputs.values() if isinstance(t, torch.Tensor))
    assert_agree(actual, expected, rounding(dtype), 1, f'case {seed}')


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shared', [True, False])
def test_windows_of_the_detectors(shared, dtype):
    """24 x 24 tokens: several tiles, float32 by three tensor core products."""
    draw = test_window_kernels.Draw(0)
    size = (24, 24) if shared else (50, 84)
    inputs = dict(
        q=draw.tensor(1, *size, 2, 32, dtype=dtype),
        k=draw.tensor(1, 50, 84, 2, 32, dtype=dtype),
        v=draw.tensor(1, 50, 84, 2, 32, dtype=dtype),
        bias=draw.tensor(2, 576, 576, dtype=torch.promote_types(dtype, torch.float32)),
        window_size=24,
    )
    there = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    names = ('q', 'k', 'v', 'bias')
    actual = {n: t.cpu() for n, t in results(ops.window_attention, there, names).items()}
    expected = results(ops.window_attention_reference, exact(inputs), names)
    assert_agree(actual, expected, rounding(dtype), 1)


def test_what_is_not_deterministic_says_so():
    inputs = test_deform_sample_kernels.case(1)
    there = {n: t.to(DEVICE).requires_grad_() for n, t in inputs.items()}
    out = ops.deform_sample(**there)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match='gradient of mmattn::deform_sample has no determ'):
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
