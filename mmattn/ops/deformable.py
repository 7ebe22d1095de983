"""Sampling a map at learned points and attending to them (DAT, arXiv 2201.00520)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import compiled_serves
from ._operator import accumulate_dtype, check_alike, check_device, register


def deform_sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample a map bilinearly, each group of its channels at positions of its own.

    Args:
        x: (B, G * c, H, W); group g is channels g*c .. (g+1)*c - 1.
        positions: (B, G, N, 2) as (y, x) in [-1, 1], the centres of the map's first and last cells
            (align_corners). What lies outside the map reads zeros.

    Returns:
        (B, G * c, N) in the dtype of ``x``, channel-last in memory where ``x`` is. Positions and weights
        are float32 (float64 for a float64 ``x``).

    Raises:
        ValueError: a shape, dtype or device does not fit the other.
    """
    _check_sample(x, positions)
    positions = positions.to(accumulate_dtype(x.dtype))
    if not compiled_serves('deform_sample', x.device.type):
        return _sample(x, positions)
    return torch.ops.mmattn.deform_sample(x, positions)


def deform_sample_reference(x: Tensor, positions: Tensor) -> Tensor:
    """The literal definition of :func:`deform_sample`, which the kernels are held against."""
    _check_sample(x, positions)
    return _sample(x, positions.to(accumulate_dtype(x.dtype)))


def _sample(x: Tensor, positions: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    groups, points = positions.shape[1:3]
    maps = x.reshape(batch * groups, channels // groups, height, width)
    grid = positions.flip(-1).reshape(batch * groups, 1, points, 2)  # grid_sample wants (x, y)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, align_corners=True)
    return sampled.reshape(batch, channels, points).to(x.dtype)


def _check_sample(x: Tensor, positions: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must be a map (B, G * c, H, W), got {tuple(x.shape)}')
    if positions.ndim != 4 or positions.shape[0] != x.shape[0] or positions.shape[3] != 2:
        raise ValueError(
            f'positions must be ({x.shape[0]}, G, N, 2) for x {tuple(x.shape)}, '
            f'got {tuple(positions.shape)}'
        )
    channels, groups = x.shape[1], positions.shape[1]
    if groups == 0 or channels == 0 or channels % groups:
        raise ValueError(f'x has {channels} channels, no multiple of the {groups} groups')
    if 0 in x.shape[2:]:
        raise ValueError(f'x must have at least one cell, got {tuple(x.shape)}')
    check_alike(x=x)
    check_device(x=x, positions=positions)


def _is_channel_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _fake_sample(x: Tensor, positions: Tensor) -> Tensor:
    batch, channels, points = *x.shape[:2], positions.shape[2]
    if _is_channel_last(x):
        return x.new_empty(batch, points, channels).transpose(1, 2)
    return x.new_empty(batch, channels, points)


def _fake_sample_gradients(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if _is_channel_last(x) else torch.contiguous_format
    dx = torch.empty_like(x, memory_format=layout)
    return dx, torch.empty_like(positions, memory_format=torch.contiguous_format)


register(
    'deform_sample',
    'Tensor x, Tensor positions',
    outputs=['sampled'],
    fake=_fake_sample,
    gradients=['x', 'positions'],
    fake_gradients=_fake_sample_gradients,
    low_precision=[],
    # Four multiply-adds a number are too few to count beside the products of attention.
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

    The bias of query n and key j for head i is ``table[i]`` read bilinearly at their
    displacement ``(query_grid[n] - key_positions[j]) / 2`` (align_corners, zeros outside).

    Args:
        q: queries, (B, heads, Nq, d).
        k: keys, (B, heads, Nk, d).
        v: values, (B, heads, Nk, d).
        table: (heads, Th, Tw), the bias for displacements from -2 to 2 in y and x.
        query_grid: (Nq, 2), where the queries stand, as (y, x) in [-1, 1].
        key_positions: (B, G, Nk, 2), where the keys were sampled, as (y, x); head i belongs to
            group ``i // (heads / G)``.
        scale: of the scores.

    Returns:
        (B, heads, Nq, d) in the dtype of ``v``. The bias, its table and the positions are float32 (float64 for
        float64 inputs); nothing of size Nq x Nk is kept.

    Raises:
        ValueError: a shape, dtype or device does not fit the others.
    """
    _check(q, k, v, table, query_grid, key_positions)
    where = _accumulated(q, table, query_grid, key_positions)
    if not compiled_serves('deform_attention', q.device.type):
        return _attend(q, k, v, *where, scale)
    return torch.ops.mmattn.deform_attention(q, k, v, *where, scale)[0]


def deform_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> Tensor:
    """The literal definition of :func:`deform_attention`, which the kernels are held against."""
    _check(q, k, v, table, query_grid, key_positions)
    return _attend(q, k, v, *_accumulated(q, table, query_grid, key_positions), scale)


def _attend(q, k, v, table, query_grid, key_positions, scale):
    scores = (scale * q) @ k.transpose(-2, -1)
    scores = scores + deform_bias(table, query_grid, key_positions)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _accumulated(q, *tensors):
    return (t.to(accumulate_dtype(q.dtype)) for t in tensors)


def deform_bias(table: Tensor, query_grid: Tensor, key_positions: Tensor) -> Tensor:
    """The bias of :func:`deform_attention`, (B, heads, Nq, Nk)."""
    batch, groups, num_keys, _ = key_positions.shape
    displacement = (query_grid[:, None] - key_positions[:, :, None]) / 2  # (B, G, Nq, Nk, 2)
    grid = displacement.flip(-1).flatten(0, 1)
    heads, *size = table.shape
    tables = table.to(grid.dtype).view(1, groups, heads // groups, *size)
    tables = tables.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, grid, align_corners=True)
    return bias.view(batch, heads, query_grid.shape[0], num_keys)


def _check(q, k, v, table, query_grid, key_positions):
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f'q and k must be (B, heads, Nq, d) and (B, heads, Nk, d), '
            f'got {tuple(q.shape)} and {tuple(k.shape)}'
        )
    if v.shape != k.shape:
        raise ValueError(f'v must be {tuple(k.shape)} as k, got {tuple(v.shape)}')
    batch, heads, num_queries, _ = q.shape
    if table.ndim != 3 or table.shape[0] != heads:
        raise ValueError(f'table must be ({heads}, Th, Tw), got {tuple(table.shape)}')
    if tuple(query_grid.shape) != (num_queries, 2):
        raise ValueError(f'query_grid must be ({num_queries}, 2), got {tuple(query_grid.shape)}')
    fits = key_positions.ndim == 4 and key_positions.shape[0::2] == (batch, k.shape[2])
    if not fits or key_positions.shape[3] != 2:
        raise ValueError(
            f'key_positions must be ({batch}, G, {k.shape[2]}, 2), got {tuple(key_positions.shape)}'
        )
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


def _fake_attention(q, k, v, table, query_grid, key_positions, scale):
    batch, heads, num_queries, d = q.shape
    out = v.new_empty(batch, num_queries, heads, d).transpose(1, 2)
    return out, v.new_empty(batch, heads, num_queries, dtype=accumulate_dtype(v.dtype))


def _attention_flops(q, k, *others):
    batch, heads, num_queries, d = q
    return 2 * 2 * batch * heads * num_queries * k[2] * d  # two products


register(
    'deform_attention',
    'Tensor q, Tensor k, Tensor v, Tensor table, Tensor query_grid, Tensor key_positions, float scale',
    outputs=['out', 'lse'],
    fake=_fake_attention,
    gradients=['q', 'k', 'v', 'table', 'key_positions'],
    low_precision=['q', 'k', 'v'],
    flops=_attention_flops,
    nondeterministic_backward=['cuda'],
)


# deform_attention's gradients by table and positions on CUDA, apart from those by q, k and v; the CPU
# kernel works all of them out at once. `lse` is the logarithm of the softmax's sums, (B, heads, Nq); it,
# table, query_grid and key_positions are in the accumulating dtype. By atomic additions: not deterministic.
torch.library.define(
    'mmattn::deform_bias_backward',
    '(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor table, Tensor query_grid, '
    'Tensor key_positions, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake('mmattn::deform_bias_backward')
def _fake_bias_backward(
    grad_out, q, k, v, table, query_grid, key_positions, out, lse, scale
) -> tuple[Tensor, Tensor]:
    return table.new_empty(table.shape), key_positions.new_empty(key_positions.shape)
