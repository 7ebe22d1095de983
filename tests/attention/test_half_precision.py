"""Activations of 1e4 in float16: every mechanism stays finite and near its float64 values."""

import pytest
import torch

from mmattn.attention import (
    DeformableAttention,
    GlobalWindowAttention,
    NeighborhoodAttention,
    QuadTreeAttention,
    WindowAttention,
)
from mmattn.attention.position_bias import POSITION_BIASES

DIM, HEADS = 32, 4
MODULES = {
    'window': lambda: WindowAttention(DIM, HEADS, 7),
    'shifted window': lambda: WindowAttention(DIM, HEADS, 7, 3),
    'global window': lambda: GlobalWindowAttention(DIM, HEADS, 7),
    'neighborhood': lambda: NeighborhoodAttention(DIM, HEADS, 5),
    'quadtree A': lambda: QuadTreeAttention(DIM, HEADS, 3, 4, attn_type='A'),
    'quadtree B': lambda: QuadTreeAttention(DIM, HEADS, 3, 4, lepe=True, level_weights=True),
    'quadtree B, one level': lambda: QuadTreeAttention(DIM, HEADS, 1, 4),
    **{
        f'deformable, {bias}': lambda bias=bias: DeformableAttention(
            DIM, HEADS, 2, 7, position_bias=bias
        )
        for bias in POSITION_BIASES
    },
}


def close_in_float16(actual, expected):
    """True if few elements differ: scores of 1e5 decide between keys by their last bit."""
    far = (actual.double() - expected).abs() > 0.02 * expected.abs().max()
    return far.double().mean() < 0.1


@pytest.mark.parametrize('mode', ['half', 'autocast'])
@pytest.mark.parametrize('name', MODULES)
def test_large_activations_stay_finite(name, mode):
    torch.manual_seed(0)
    module = MODULES[name]().double()
    inputs = [torch.randn(2, 17, 21, DIM) * 1e4]
    if name == 'global window':
        inputs.append(torch.randn(2, 7, 7, DIM) * 1e4)
    inputs = [x.clamp(-6e4, 6e4).half() for x in inputs]
    expected = module(*(x.double() for x in inputs))
    assert expected.abs().max() < 6e4
    if mode == 'half':
        out = module.half()(*inputs)
    else:
        with torch.autocast('cpu', torch.float16):
            out = module.float()(*(x.float() for x in inputs))
    assert out.isfinite().all()
    assert close_in_float16(out, expected)
