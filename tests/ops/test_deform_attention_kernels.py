"""deform_attention's compiled kernels against the reference."""

import pytest
import torch
from helpers.comparison import EPS, Draw, assert_agree, exact, results, rounding

from mmattn.ops import deform_attention, deform_attention_reference

GRADIENTS = ('q', 'k', 'v', 'table', 'key_positions')


def case(seed, most_keys=40):
    draw = Draw(seed)
    dtype = draw.dtype()
    where = torch.promote_types(dtype, torch.float32)
    batch, groups, d = draw.integer(0, 2), draw.integer(1, 3), draw.one_of(1, 5, 8, 16, 32, 40)
    heads, queries, keys = (
        groups * draw.integer(1, 2),
        draw.integer(0, 70),
        draw.integer(1, most_keys),
    )
    return dict(
        q=draw.tensor(batch, heads, queries, d, dtype=dtype),
        k=draw.tensor(batch, heads, keys, d, dtype=dtype),
        v=draw.tensor(batch, heads, keys, d, dtype=dtype),
        table=draw.tensor(heads, draw.integer(1, 9), draw.integer(1, 9), dtype=where),
        query_grid=draw.tensor(queries, 2, dtype=where) / 2,
        key_positions=draw.tensor(batch, groups, keys, 2, dtype=where),  # some outside the table
        scale=draw.one_of(d**-0.5, 1.0),
    )


def test_cpu_kernels_equal_the_reference(fuzz_seeds):
    for seed in fuzz_seeds:
        inputs = case(seed)
        actual = results(deform_attention, inputs, GRADIENTS)
        expected = results(deform_attention_reference, exact(inputs), GRADIENTS)
        assert_agree(actual, expected, rounding(inputs['v'].dtype), 1, f'case {seed}')


def test_more_keys_than_a_tile():
    inputs = exact(case(1, most_keys=1))
    draw = Draw(1)
    batch, heads, queries, d = inputs['q'].shape
    groups = inputs['key_positions'].shape[1]
    inputs['k'], inputs['v'] = (draw.tensor(batch, heads, 600, d) for _ in range(2))
    inputs['key_positions'] = draw.tensor(batch, groups, 600, 2)
    actual, expected = (
        results(f, inputs, GRADIENTS) for f in (deform_attention, deform_attention_reference)
    )
    assert queries and batch
    assert_agree(actual, expected, EPS[torch.float64], 200)


def test_positions_far_outside_and_not_finite_have_no_bias():
    inputs = exact(case(12))
    assert inputs['q'].numel()
    for value in (1e6, -1e6, torch.inf, torch.nan):
        inputs['key_positions'] = torch.full_like(inputs['key_positions'], value)
        plain = torch.nn.functional.scaled_dot_product_attention(
            inputs['q'], inputs['k'], inputs['v'], scale=inputs['scale']
        )
        torch.testing.assert_close(deform_attention(**inputs), plain)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_softmax_of_huge_scores(dtype):
    inputs = exact(case(12))
    inputs['q'] = inputs['q'] * 1e4
    inputs = {n: t.to(dtype) if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    actual, expected = deform_attention(**inputs), deform_attention_reference(**exact(inputs))
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() < 1e6 * EPS[dtype]


def test_operator_is_registered_completely():
    draw = Draw(0)
    tensors = [
        draw.tensor(*shape, dtype=torch.float32)
        for shape in ((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8), (4, 7, 5), (6, 2), (2, 2, 5, 2))
    ]
    tensors = [t.requires_grad_(i != 4) for i, t in enumerate(tensors)]
    torch.library.opcheck(
        torch.ops.mmattn.deform_attention.default, (*tensors, 0.5), atol=1e-5, rtol=1e-4
    )


def test_result_does_not_depend_on_threads():
    inputs = case(12)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results(deform_attention, inputs, GRADIENTS))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
