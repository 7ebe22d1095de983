"""window_attention's compiled kernels against the reference."""

import pytest
import torch
from helpers.comparison import EPS, Draw, assert_agree, exact, results, rounding

from mmattn.ops import window_attention, window_attention_reference

GRADIENTS = ('q', 'k', 'v', 'bias', 'pad_k', 'pad_v')


def case(seed, largest_window=9):
    draw = Draw(seed)
    dtype = draw.dtype()
    batch, heads, d = draw.integer(0, 3), draw.integer(1, 3), draw.one_of(1, 5, 8, 16, 32, 40)
    height, width = draw.integer(1, 15), draw.integer(1, 15)
    window = draw.integer(1, largest_window)
    shared = draw.one_of(True, False)
    shift = 0 if shared else draw.integer(0, window - 1)
    size = (window, window) if shared else (height, width)
    if draw.one_of(True, False) and not shared:  # views of one projection
        q, k, v = draw.tensor(batch, height, width, 3, heads, d, dtype=dtype).unbind(3)
    else:
        q = draw.tensor(batch, *size, heads, d, dtype=dtype)
        k, v = (draw.tensor(batch, height, width, heads, d, dtype=dtype) for _ in range(2))
    bias = draw.tensor(heads, window**2, window**2, dtype=torch.promote_types(dtype, torch.float32))
    pads = {
        name: draw.tensor(heads, d, dtype=dtype)
        for name in ('pad_k', 'pad_v')
        if draw.one_of(True, False)
    }
    return dict(q=q, k=k, v=v, bias=bias, window_size=window, shift=shift, **pads)


def test_cpu_kernels_equal_the_reference(fuzz_seeds):
    for seed in fuzz_seeds:
        inputs = case(seed)
        actual = results(window_attention, inputs, GRADIENTS)
        expected = results(window_attention_reference, exact(inputs), GRADIENTS)
        assert_agree(actual, expected, rounding(inputs['v'].dtype), 1, f'case {seed}')


@pytest.mark.parametrize('window', [17, 24])
@pytest.mark.parametrize('shared', [True, False])
def test_windows_of_several_tiles(window, shared):
    """With 289 and 576 keys, more than one tile of 256."""
    draw = Draw(window)
    size = (window, window) if shared else (30, 26)
    inputs = dict(
        q=draw.tensor(1, *size, 2, 8),
        k=draw.tensor(1, 30, 26, 2, 8),
        v=draw.tensor(1, 30, 26, 2, 8),
        bias=draw.tensor(2, window**2, window**2),
        pad_k=draw.tensor(2, 8),
        pad_v=draw.tensor(2, 8),
        window_size=window,
        shift=0 if shared else 5,
    )
    actual, expected = (
        results(f, inputs, GRADIENTS) for f in (window_attention, window_attention_reference)
    )
    assert_agree(actual, expected, EPS[torch.float64], 60)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_softmax_of_huge_scores(dtype):
    """Scores of +-1e4 and more."""
    inputs = case(3) | dict(pad_k=None, pad_v=None)
    inputs = exact(inputs)
    inputs['q'] = inputs['q'] * 1e3
    inputs['k'] = inputs['k'] * 1e2
    low = {n: t.to(dtype) if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    actual, expected = window_attention(**low), window_attention_reference(**exact(low))
    assert actual.isfinite().all()
    # An error of one float32 eps in a score of 1e5 is one percent of its exponential.
    assert (actual.double() - expected).abs().max() < 1e6 * EPS[dtype]


def test_nan_is_not_hidden():
    inputs = case(8)
    inputs['k'] = torch.full_like(inputs['k'], torch.nan)
    out = window_attention(**inputs)
    assert out.numel() and out.isnan().all()


def test_operator_is_registered_completely():
    draw = Draw(0)
    q, k, v = draw.tensor(2, 5, 4, 3, 2, 8, dtype=torch.float32).requires_grad_().unbind(3)
    bias = draw.tensor(2, 9, 9, dtype=torch.float32).requires_grad_()
    pads = [draw.tensor(2, 8, dtype=torch.float32).requires_grad_() for _ in range(2)]
    torch.library.opcheck(
        torch.ops.mmattn.window_attention.default,
        (q, k, v, bias, *pads, 3, 1),
        atol=1e-5,
        rtol=1e-4,
    )


def test_second_derivative_is_refused():
    inputs = case(2)
    leaf = inputs['v'].detach().requires_grad_()
    out = window_attention(**(inputs | dict(v=leaf)))
    (gradient,) = torch.autograd.grad(out.double().square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: set MMATTN_OPS=reference'):
        gradient.sum().backward()


def test_result_does_not_depend_on_threads():
    inputs = case(5, largest_window=7)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results(window_attention, inputs, GRADIENTS))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
