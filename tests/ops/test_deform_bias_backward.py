"""Gradients of deform_attention by table and positions on CUDA, against the reference."""

import pytest
import torch
from helpers import cuda_on_host
from helpers.comparison import EPS, Draw, assert_agree, exact

from mmattn.ops import deform_attention_reference, deform_bias

NAMES = ('q', 'k', 'v', 'table', 'query_grid', 'key_positions')


def even_grid(height, width, dtype):
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (height, width)
    )
    return torch.cartesian_prod(rows, columns).reshape(-1, 2).to(dtype)


def case(seed, largest=12, depths=(8, 32, 40)):
    draw = Draw(seed)
    dtype = draw.dtype()
    where = torch.promote_types(dtype, torch.float32)
    batch, groups, per_group = draw.integer(1, 2), draw.integer(1, 2), draw.integer(1, 2)
    heads, depth = groups * per_group, draw.one_of(*depths)
    height, width, keys = (
        draw.integer(1, largest),
        draw.integer(1, largest),
        draw.integer(1, 5 * largest),
    )
    grid = even_grid(height, width, where)
    if draw.one_of(True, False):
        grid = draw.tensor(height * width, 2, dtype=where)
    vectors = {
        name: draw.tensor(batch, heads, n, depth, dtype=dtype)
        for name, n in (('q', height * width), ('k', keys), ('v', keys))
    }
    size = draw.integer(1, 9), draw.integer(1, 9)
    return vectors | dict(
        table=draw.tensor(heads, *size, dtype=where),
        query_grid=grid,
        # Some displacements are outside the table.
        key_positions=draw.tensor(batch, groups, keys, 2, dtype=where) * draw.one_of(0.5, 2),
        scale=depth**-0.5,
    )


def check(inputs, factor=30, context=''):
    eps = EPS[inputs['q'].dtype]
    wanted = exact(inputs)
    leaves = {n: wanted[n].detach().requires_grad_() for n in ('table', 'key_positions')}
    out = deform_attention_reference(**(wanted | leaves))
    grad = cuda_on_host.upstream(out).to(inputs['q'].dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.double())
    bias = deform_bias(*(wanted[name] for name in NAMES[3:]))
    lse = (wanted['scale'] * wanted['q'] @ wanted['k'].mT + bias).logsumexp(-1)

    actual = cuda_on_host.operators().deform_bias_backward(
        grad,
        *(inputs[name] for name in NAMES),
        out.detach().to(inputs['q'].dtype),
        lse.to(inputs['table'].dtype),
        inputs['scale'],
    )
    named = (dict(zip(leaves, values, strict=True)) for values in (actual, gradients))
    assert_agree(*named, eps, factor, context)


def test_cuda_kernel_equals_the_reference():
    for seed in range(60):
        inputs = case(seed)
        check(inputs, context=f'case {seed}')


@pytest.mark.parametrize('depth', [96, 128])
def test_lanes_that_share_a_key(depth):
    check(case(0, depths=(depth,)))


@pytest.mark.parametrize('height, width', [(40, 30), (3, 400)])
def test_several_chunks_and_tiles(height, width):
    draw = Draw(0)
    q, k, v = (draw.tensor(1, 2, n, 8, strided=False) for n in (height * width, 150, 150))
    check(
        dict(
            q=q, k=k, v=v, table=draw.tensor(2, 7, 13), query_grid=even_grid(height, width, q.dtype)
        )
        | dict(key_positions=draw.tensor(1, 1, 150, 2) / 2, scale=0.3)
    )


def test_a_table_beyond_shared_memory():
    draw = Draw(0)
    q, k, v = (draw.tensor(1, 1, n, 8, strided=False) for n in (30, 20, 20))
    check(
        dict(q=q, k=k, v=v, table=draw.tensor(1, 131, 121), query_grid=even_grid(5, 6, q.dtype))
        | dict(key_positions=draw.tensor(1, 1, 20, 2) / 2, scale=0.3)
    )


def test_nothing_where_nothing_is_near():
    inputs = case(2) | dict(key_positions=torch.full((1, 1, 3, 2), torch.nan))
    q = torch.randn(1, 1, 4, 8)
    inputs |= dict(q=q, k=q[:, :, :3], v=q[:, :, :3], table=torch.randn(1, 3, 3))
    inputs |= dict(query_grid=even_grid(2, 2, torch.float32))
    arguments = (inputs[name] for name in NAMES)
    gradients = cuda_on_host.operators().deform_bias_backward(
        q, *arguments, q, torch.zeros(1, 1, 4), 1.0
    )
    assert not any(gradient.any() for gradient in gradients)


def test_shapes_without_data():
    meta = {n: t.to('meta') if torch.is_tensor(t) else t for n, t in case(0).items()}
    grad_table, grad_positions = torch.ops.mmattn.deform_bias_backward(
        meta['q'],
        *(meta[name] for name in NAMES),
        meta['q'],
        meta['q'].new_empty(meta['q'].shape[:-1]),
        1.0,
    )
    assert grad_table.shape == meta['table'].shape
    assert grad_positions.shape == meta['key_positions'].shape
