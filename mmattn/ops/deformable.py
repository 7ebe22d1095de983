"""Bilinear sampling of a map at learned points, and attention to them (DAT, arXiv 2201.00520)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import use_compiled
from ._checks import check_alike, check_device, check_shape
from ._operator import Operator, accumulate_dtype, result_dtype, without_autocast


def deform_sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample a map bilinearly, each group of channels at its own positions.

    Args:
        x: (B, G * c, H, W); group g is channels g*c .. (g+1)*c - 1.
        positions: (B, G, N, 2) as (y, x); -1 and 1 are the centers of the map's first and last
            cells (align_corners). Outside the map, zeros are read.

    Returns:
        (B, G * c, N) in the dtype of ``x``, channels-last in memory if ``x`` is. Positions and
        weights are float32 (float64 for a float64 ``x``).

    Raises:
        ValueError: a shape, dtype or device does not fit the other.
    """
    _check_sample(x, positions)
    positions = positions.to(accumulate_dtype(x.dtype))
    if not use_compiled('deform_sample', x.device.type):
        return _sample(x, positions)
    return torch.ops.mmattn.deform_sample(x, positions)


def deform_sample_reference(x: Tensor, positions: Tensor) -> Tensor:
    """PyTorch reference of :func:`deform_sample`."""
    _check_sample(x, positions)
    return _sample(x, positions.to(accumulate_dtype(x.dtype)))


def _sample(x: Tensor, positions: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    groups, points = positions.shape[1:3]
    maps = x.reshape(batch * groups, channels // groups, height, width)
    grid = positions.flip(-1).reshape(batch * groups, 1, points, 2)  # grid_sample reads (x, y)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, align_corners=True)
    return sampled.reshape(batch, channels, points).to(x.dtype)


def _check_sample(x: Tensor, positions: Tensor) -> None:
    check_shape('x', x, 'B G*c H W', (None, None, None, None))
    check_shape('positions', positions, 'B G N 2', (x.shape[0], None, None, 2))
    channels, groups = x.shape[1], positions.shape[1]
    if groups == 0 or channels == 0 or channels % groups:
        raise ValueError(f'x has {channels} channels, no multiple of the {groups} groups')
    if 0 in x.shape[2:]:
        raise ValueError(f'x must have at least one cell, got {tuple(x.shape)}')
    check_alike(x=x)
    check_device(x=x, positions=positions)


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _fake_sample(x: Tensor, positions: Tensor) -> Tensor:
    batch, channels, points = *x.shape[:2], positions.shape[2]
    if _is_channels_last(x):
        return x.new_empty(batch, points, channels).transpose(1, 2)
    return x.new_empty(batch, channels, points)


def _fake_sample_gradients(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    dx = torch.empty_like(x, memory_format=layout)
    return dx, torch.empty_like(positions, memory_format=torch.contiguous_format)


Operator(
    'deform_sample',
    'Tensor x, Tensor positions',
    outputs=['sampled'],
    fake=_fake_sample,
    gradients=['x', 'positions'],
    fake_gradients=_fake_sample_gradients,
    low_precision=[],
    # Four multiply-adds for each value are negligible beside attention.
    flops=lambda x, positions: 0,
    nondeterministic_backward=['cuda'],  # atomic additions to the map's gradient
)


def deform_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> Tensor:
    """Attention to sampled keys: ``softmax(scale q k^T + bias) v``.

    The bias of query n and key j for head i is ``table[i]`` read bilinearly at their displacement
    ``(query_grid[n] - key_positions[j]) / 2`` (align_corners, zeros outside).

    Args:
        q: queries, (B, heads, Nq, d).
        k: keys, (B, heads, Nk, d).
        v: values, (B, heads, Nk, d).
        table: (heads, Th, Tw), the bias for displacements from -2 to 2 in y and x.
        query_grid: (Nq, 2), positions of the queries, as (y, x) in [-1, 1].
        key_positions: (B, G, Nk, 2), positions of the keys, as (y, x); head i belongs to group
            ``i // (heads / G)``.
        scale: factor of the scores.

    Returns:
        (B, heads, Nq, d) in the dtype of ``v``. The bias, its table and the positions are float32
        (float64 for float64 inputs). The kernels keep nothing of size Nq x Nk.

    Raises:
        ValueError: a shape, dtype or device does not fit the others.
    """
    _check(q, k, v, table, query_grid, key_positions)
    dtype = accumulate_dtype(q.dtype)
    geometry = table.to(dtype), query_grid.to(dtype), key_positions.to(dtype)
    if not use_compiled('deform_attention', q.device.type):
        return _attend(q, k, v, *geometry, scale)
    return torch.ops.mmattn.deform_attention(q, k, v, *geometry, scale)[0]


def deform_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> Tensor:
    """PyTorch reference of :func:`deform_attention`."""
    _check(q, k, v, table, query_grid, key_positions)
    dtype = accumulate_dtype(q.dtype)
    geometry = table.to(dtype), query_grid.to(dtype), key_positions.to(dtype)
    return _attend(q, k, v, *geometry, scale)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> Tensor:
    dtype = result_dtype(v)
    q, k, v = (t.to(accumulate_dtype(v.dtype)) for t in (q, k, v))
    with without_autocast(v):
        scores = (scale * q) @ k.transpose(-2, -1)
        scores = scores + deform_bias(table, query_grid, key_positions)
        return (scores.softmax(dim=-1) @ v).to(dtype)


def deform_bias(table: Tensor, query_grid: Tensor, key_positions: Tensor) -> Tensor:
    """Bias of :func:`deform_attention`, (B, heads, Nq, Nk)."""
    batch, groups, num_keys, _ = key_positions.shape
    displacement = (query_grid[:, None] - key_positions[:, :, None]) / 2  # (B, G, Nq, Nk, 2)
    grid = displacement.flip(-1).flatten(0, 1)
    heads, *size = table.shape
    tables = table.to(grid.dtype).view(1, groups, heads // groups, *size)
    tables = tables.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, grid, align_corners=True)
    return bias.view(batch, heads, query_grid.shape[0], num_keys)


def _check(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, query_grid: Tensor, key_positions: Tensor
) -> None:
    check_shape('q', q, 'B heads Nq d', (None, None, None, None))
    batch, heads, num_queries, d = q.shape
    check_shape('k', k, 'B heads Nk d', (batch, heads, None, d))
    num_keys = k.shape[2]
    check_shape('v', v, 'B heads Nk d', tuple(k.shape))
    check_shape('table', table, 'heads Th Tw', (heads, None, None))
    check_shape('query_grid', query_grid, 'Nq 2', (num_queries, 2))
    check_shape('key_positions', key_positions, 'B G Nk 2', (batch, None, num_keys, 2))
    if key_positions.shape[1] == 0 or heads % key_positions.shape[1]:
        raise ValueError(
            f'{heads} heads are no multiple of the {key_positions.shape[1]} groups of key_positions'
        )
    check_alike(q=q, k=k, v=v)
    check_device(q=q, table=table, query_grid=query_grid, key_positions=key_positions)
    if 0 in (*k.shape[2:], *table.shape):
        raise ValueError(
            f'k and table must not be empty, got {tuple(k.shape)} and {tuple(table.shape)}'
        )


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, d = q.shape
    out = v.new_empty(batch, num_queries, heads, d).transpose(1, 2)
    return out, v.new_empty(batch, heads, num_queries, dtype=accumulate_dtype(v.dtype))


def _attention_flops(q: torch.Size, k: torch.Size, *others: torch.Size | float) -> int:
    batch, heads, num_queries, d = q
    return 2 * 2 * batch * heads * num_queries * k[2] * d  # two products


Operator(
    'deform_attention',
    'Tensor q, Tensor k, Tensor v, Tensor table, Tensor query_grid, Tensor key_positions, '
    'float scale',
    outputs=['out', 'lse'],
    fake=_fake_attention,
    gradients=['q', 'k', 'v', 'table', 'key_positions'],
    low_precision=['q', 'k', 'v'],
    flops=_attention_flops,
    nondeterministic_backward=['cuda'],
)


# Gradients of deform_attention by table and positions on CUDA; there, those by q, k and v are
# Triton kernels, while the CPU kernel computes all of them at once. `lse` is the log-sum-exp of the
# scores, (B, heads, Nq); it, table, query_grid and key_positions are in the accumulating dtype. Not
# deterministic: it adds atomically.
torch.library.define(
    'mmattn::deform_bias_backward',
    '(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor table, Tensor query_grid, '
    'Tensor key_positions, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake('mmattn::deform_bias_backward')
def _fake_bias_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return table.new_empty(table.shape), key_positions.new_empty(key_positions.shape)
