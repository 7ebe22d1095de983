"""deform_sample's compiled kernels against the reference."""

import pytest
import torch
from helpers import cuda_on_host
from helpers.comparison import Draw, assert_agree, exact, results, rounding

from mmattn.ops import deform_sample, deform_sample_reference

GRADIENTS = ('x', 'positions')


def case(seed, largest=12):
    draw = Draw(seed)
    dtype = draw.dtype()
    batch, groups, depth = draw.integer(0, 3), draw.integer(1, 3), draw.integer(1, 40)
    height, width = draw.integer(1, largest), draw.integer(1, largest)
    x = draw.tensor(batch, groups * depth, height, width, dtype=dtype)
    if draw.one_of(True, False):
        x = x.to(memory_format=torch.channels_last)
    points = draw.integer(0, 70)
    where = torch.promote_types(dtype, torch.float32)
    return dict(x=x, positions=draw.tensor(batch, groups, points, 2, dtype=where))


def test_cpu_kernels_equal_the_reference(fuzz_seeds):
    for seed in fuzz_seeds:
        inputs = case(seed)
        actual = results(deform_sample, inputs, GRADIENTS)
        expected = results(deform_sample_reference, exact(inputs), GRADIENTS)
        assert_agree(actual, expected, rounding(inputs['x'].dtype), 1, f'case {seed}')


def test_cuda_kernels_equal_the_reference():
    operators = cuda_on_host.operators()
    for seed in range(40):
        inputs = case(seed, largest=6)
        expected = results(deform_sample_reference, exact(inputs), GRADIENTS)
        sampled = operators.deform_sample(**inputs)
        weight = cuda_on_host.upstream(sampled)
        gradients = operators.deform_sample_backward(weight, *inputs.values(), sampled)
        actual = dict(zip(expected, (sampled, *gradients), strict=True))
        assert_agree(actual, expected, rounding(inputs['x'].dtype), 1, f'case {seed}')


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_operator_is_registered_completely(layout):
    x = torch.randn(2, 4, 3, 5).to(memory_format=layout).requires_grad_()
    positions = torch.randn(2, 2, 6, 2).requires_grad_()
    torch.library.opcheck(torch.ops.mmattn.deform_sample.default, (x, positions))
