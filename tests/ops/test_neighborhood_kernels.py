"""neighborhood_attention's compiled kernels against the reference."""

import pytest
import torch
from helpers import cuda_on_host
from helpers.comparison import EPS, Draw, assert_agree, exact, results, rounding
from torch.utils.flop_counter import FlopCounterMode

from mmattn.ops import neighborhood_attention, neighborhood_attention_reference

GRADIENTS = ('q', 'k', 'v', 'rpb')


def case(seed, largest=14, kernels=(3, 5, 7, 9), depths=40):
    draw = Draw(seed)
    dtype, kernel = draw.dtype(), draw.one_of(*kernels)
    batch, heads, depth = draw.integer(0, 2), draw.integer(1, 3), draw.integer(1, depths)
    height, width = (kernel + draw.integer(0, largest) for _ in range(2))
    size = (batch, height, width, heads, depth)
    if draw.one_of(True, False):
        fused = draw.tensor(batch, height, width, 3, heads, depth, dtype=dtype)
        q, k, v = fused.unbind(-3)
    else:
        q, k, v = (draw.tensor(*size, dtype=dtype) for _ in range(3))
    bias_dtype = torch.promote_types(dtype, torch.float32)
    rpb = draw.tensor(heads, 2 * kernel - 1, 2 * kernel - 1, dtype=bias_dtype)
    return dict(q=q, k=k, v=v, rpb=rpb, kernel_size=kernel, scale=depth**-0.5)


def run_on_host(inputs):
    operators = cuda_on_host.operators()
    out, lse = operators.neighborhood_attention(*inputs.values())
    gradients = operators.neighborhood_attention_backward(
        cuda_on_host.upstream(out), *inputs.values(), out, lse
    )
    return out, *gradients


def test_cpu_kernels_equal_the_reference(fuzz_seeds):
    for seed in fuzz_seeds:
        inputs = case(seed)
        actual = results(neighborhood_attention, inputs, GRADIENTS)
        expected = results(neighborhood_attention_reference, exact(inputs), GRADIENTS)
        assert_agree(actual, expected, rounding(inputs['q'].dtype), 1, f'case {seed}')


def test_cuda_kernels_equal_the_reference():
    for seed in range(30):
        inputs = case(seed, largest=4, kernels=(3, 5), depths=(seed % 3 + 1) * 40)
        expected = results(neighborhood_attention_reference, exact(inputs), GRADIENTS)
        actual = dict(zip(expected, run_on_host(inputs), strict=True))
        assert_agree(actual, expected, rounding(inputs['q'].dtype), 1, f'case {seed}')


def test_a_window_of_one_token_is_the_identity():
    q, k, v = torch.randn(2, 5, 9, 3, 2, 8).unbind(-3)
    inputs = dict(q=q, k=k, v=v, rpb=torch.randn(2, 1, 1), kernel_size=1, scale=1.0)
    compiled = list(results(neighborhood_attention, inputs, GRADIENTS).values())
    for out, dq, dk, dv, drpb in (compiled, run_on_host(inputs)):
        torch.testing.assert_close(out, v)
        torch.testing.assert_close(dv, cuda_on_host.upstream(out))
        for zero in (dq, dk, drpb):  # a softmax over one key is constant
            torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)


@pytest.mark.parametrize('height, width, kernel', [(9, 40, 7), (14, 15, 13), (21, 21, 21)])
def test_cuda_kernels_with_wide_maps_and_windows(height, width, kernel):
    draw = Draw(0)
    q, k, v = draw.tensor(1, height, width, 3, 1, 8, strided=False).unbind(-3)
    rpb = draw.tensor(1, 2 * kernel - 1, 2 * kernel - 1, strided=False)
    inputs = dict(q=q, k=k, v=v, rpb=rpb, kernel_size=kernel, scale=0.3)
    expected = results(neighborhood_attention_reference, inputs, GRADIENTS)
    actual = dict(zip(expected, run_on_host(inputs), strict=True))
    assert_agree(actual, expected, EPS[torch.float64], 30)


@pytest.mark.parametrize('depth, kernel, limit', [(129, 1, 'd up to 128'), (8, 23, 'up to 21')])
def test_cuda_kernels_say_what_they_cannot(depth, kernel, limit):
    q = torch.zeros(1, kernel, kernel, 1, depth)
    rpb = torch.zeros(1, 2 * kernel - 1, 2 * kernel - 1)
    with pytest.raises(RuntimeError, match=limit):
        cuda_on_host.operators().neighborhood_attention(q, q, q, rpb, kernel, 1.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_large_scores(dtype):
    inputs = case(3, kernels=(7,)) | dict(scale=1e3)
    inputs = {n: t.to(dtype) if torch.is_tensor(t) else t for n, t in inputs.items()}
    expected = results(neighborhood_attention_reference, exact(inputs), GRADIENTS)
    actual = results(neighborhood_attention, inputs, GRADIENTS)
    # The relative error of a probability is the absolute error of its score: eps times the score.
    assert_agree(actual, expected, EPS[dtype], 1e5)


def test_infinite_values_stay_in_their_windows():
    q, k, v = Draw(0).tensor(1, 5, 20, 3, 1, 8, strided=False).unbind(-3)
    for t in (k, v):
        t[:, :, 10] = torch.inf
    out = neighborhood_attention(q, k, v, torch.zeros(1, 5, 5).double(), 3, 1.0)
    assert out[:, :, :9].isfinite().all() and out[:, :, 12:].isfinite().all()


def test_results_do_not_depend_on_threads():
    inputs = case(4, largest=30, kernels=(7,))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(results(neighborhood_attention, inputs, GRADIENTS))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_operator_is_registered_completely():
    q, k, v = torch.randn(2, 5, 6, 3, 2, 8).unbind(-3)
    tensors = [t.detach().requires_grad_() for t in (q, k, v, torch.randn(2, 5, 5))]
    operator = torch.ops.mmattn.neighborhood_attention.default
    torch.library.opcheck(operator, (*tensors, 3, 0.5))


def test_gradcheck():
    q, k, v = torch.randn(1, 4, 9, 3, 2, 3, dtype=torch.float64).unbind(-3)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    tensors = [t.detach().requires_grad_() for t in (q, k, v, rpb)]
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attention(*t, 3, 0.5), tensors)


@pytest.mark.parametrize(
    'dtype, expected', [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_autocast(dtype, expected):
    q, k, v = torch.randn(1, 4, 5, 3, 2, 8, dtype=dtype).unbind(-3)
    rpb = torch.randn(2, 5, 5)
    inputs = dict(q=q, k=k, v=v, rpb=rpb, kernel_size=3, scale=0.4)
    with torch.autocast('cpu', torch.bfloat16):
        out = neighborhood_attention(**inputs)
    assert out.dtype == expected
    wanted = neighborhood_attention_reference(**inputs)
    torch.testing.assert_close(out.to(dtype), wanted, rtol=0.02, atol=0.02)


def test_flops_are_those_of_the_reference():
    q, k, v = torch.randn(2, 6, 7, 3, 2, 8).unbind(-3)
    inputs = dict(q=q, k=k, v=v, rpb=torch.randn(2, 9, 9), kernel_size=5, scale=0.4)
    counts = []
    for function in (neighborhood_attention, neighborhood_attention_reference):
        with FlopCounterMode(display=False) as counter:
            function(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * (2 * 6 * 7 * 2) * 25 * 8


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(k=torch.zeros(1, 3, 3, 1, 8).double()), 'q and k must have one dtype.*float64'),
        (dict(rpb=torch.zeros(1, 5, 5, device='meta')), 'q and rpb must be on one device.*meta'),
        (dict.fromkeys('qkv', torch.zeros(1, 3, 3, 1, 0)), 'at least one channel'),
    ],
)
def test_errors(change, message):
    q = torch.zeros(1, 3, 3, 1, 8)
    inputs = dict(q=q, k=q, v=q, rpb=torch.zeros(1, 5, 5), kernel_size=3, scale=1.0)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**(inputs | change))
