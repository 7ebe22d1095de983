"""Deformable attention in Triton: tiles with online softmax, the bias sampled for each tile.

The tiling, and recomputing scores from the log-sum-exp in the backward pass, are
FlashAttention's (arXiv 2205.14135); the attention and its bias DAT's (2201.00520, section
3.2). Nothing of the size queries x keys is in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    LOG2E,
    accumulator,
    choose_tile,
    device_of,
    dot,
    last_contiguous,
    load_tokens,
    store_tokens,
)


def deform_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` as ``mmattn.ops.deform_attention``.

    Args:
        q: queries, (B, heads, Nq, d). Any strides but the last, as k and v; float16, bfloat16,
            float32 or float64, all alike.
        k: keys, (B, heads, Nk, d).
        v: values, (B, heads, Nk, d).
        table: (heads, Th, Tw), the bias for displacements from -2 to 2 in y and x; float32, float64
            for float64 inputs, as the next two.
        query_grid: (Nq, 2), positions of the queries, as (y, x).
        key_positions: (B, G, Nk, 2), where the keys were sampled; head i belongs to group
            ``i // (heads / G)``.
        scale: of the scores.

    Returns:
        The attention, (B, heads, Nq, d) in the dtype of ``v``, and the log-sum-exp of each query's
        scores, (B, heads, Nq) in the dtype of ``table``. A query's heads lie side by side, as its
        projection wants them.
    """
    batch, heads, num_queries, d = q.shape
    out = torch.empty(batch, num_queries, heads, d, dtype=v.dtype, device=v.device).transpose(1, 2)
    lse = torch.empty(q.shape[:-1], dtype=accumulator(q.dtype), device=q.device)
    if out.numel():
        inputs, sizes, by_query, _ = _launch(q, k, v, table, query_grid, key_positions, scale)
        with device_of(q):
            by_query.run(_forward, *inputs, out, out.stride()[:3], lse, *sizes)
    return out, lse


def deform_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`deform_attention_forward` by q, k and v; deterministic.

    Args:
        grad: of ``out``, (B, heads, Nq, d).
        q, k, v, table, query_grid, key_positions, scale: what the forward pass was given.
        out, lse: what it returned.

    Returns:
        The gradients of q, k and v; each contiguous, in the shape and dtype of what it belongs to.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel():  # no query reaches the keys
        return dq, dk.zero_(), dv.zero_()
    inputs, sizes, by_query, by_key = _launch(q, k, v, table, query_grid, key_positions, scale)
    grad = last_contiguous(grad.to(v.dtype))
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    inputs = (*inputs, grad, grad.stride()[:3])
    with device_of(q):
        result = last_contiguous(out)
        by_query.run(_backward_query, *inputs, result, result.stride()[:3], lse, delta, dq, *sizes)
        by_key.run(_backward_key, *inputs, lse, delta, dk, dv, *sizes)
    return dq, dk, dv


def _launch(q, k, v, table, query_grid, key_positions, scale):
    """Constants of all kernels of one call, and their grids: by queries and by keys."""
    q, k, v = (last_contiguous(t) for t in (q, k, v))
    batch, heads, num_queries, d = q.shape
    num_keys, groups = k.shape[2], key_positions.shape[1]
    inputs = []
    for x in (q, k, v):
        inputs += [x, x.stride()[:3]]
    inputs += [_pairs(table), query_grid.contiguous(), key_positions.contiguous()]
    sizes = (num_queries, num_keys, *table.shape[1:], heads, heads // groups)
    tile = choose_tile(num_queries, num_keys, d, q.dtype, gathers=True)
    by_query = _Grid(batch * heads, num_queries, tile, scale, d, tile.own, tile.other)
    tile = choose_tile(num_keys, num_queries, d, q.dtype, gathers=True)
    by_key = _Grid(batch * heads, num_keys, tile, scale, d, tile.other, tile.own)
    return inputs, sizes, by_query, by_key


class _Grid:
    """A program for each tile that owns tokens."""

    def __init__(self, pairs, tokens, tile, scale, d, queries, keys):
        self.grid = (pairs * triton.cdiv(tokens, tile.own),)
        self.constants = dict(
            SCALE=scale,
            D=d,
            BLOCK_D=tile.channels,
            BLOCK_M=queries,
            BLOCK_N=keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def run(self, kernel, *arguments):
        kernel[self.grid](*arguments, **self.constants)


def _pairs(table: Tensor) -> Tensor:
    """Each entry of the table and its right neighbor, times LOG2E, within a border of zeros.

    (heads, Th, Tw) -> (heads, Th + 3, Tw + 2, 2): one row before the table and two after it, so
    that cells next to it can be read like others. float32 pairs are returned as one integer each.
    """
    _, height, width = table.shape
    if (height + 3) * (width + 2) > 2**24:  # up to there, float32 counts entries exactly
        raise ValueError(f'a table of {tuple(table.shape[1:])} entries a head is too large')
    padded = F.pad(table * LOG2E.value, (1, 2, 1, 2))
    pairs = padded.unfold(2, 2, 1).contiguous()
    return pairs.view(torch.int64) if table.dtype == torch.float32 else pairs


@triton.jit
def _program(tiles, heads):
    """Image, head and tile of this program; the tile changes first, to share a table in cache."""
    pair = tl.program_id(0) // tiles
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def _rows(x, strides, image, head, n):
    """Offsets of the tokens n of an image and head."""
    return x + image * strides[0] + head * strides[1] + n.to(tl.int64) * strides[2]


@triton.jit
def _points(positions, n, valid):
    """(y, x) / 4 of the points n: the difference of two is half of grid_sample's position."""
    at = positions + n.to(tl.int64) * 2
    return tl.load(at, mask=valid, other=0.0) * 0.25, tl.load(at + 1, mask=valid, other=0.0) * 0.25


@triton.jit
def _cell(displacement, size):
    """Cell of the table, from -1 to its size, and fraction in it, as floats.

    grid_sample's ``((displacement / 2 + 1) / 2) * (size - 1)``, which halving at once, being exact,
    does not change. Whatever lies further than a cell outside reads nothing but the table's border
    of zeros.
    """
    place = tl.minimum(tl.maximum((displacement + 0.5) * (size - 1.0), -1.0), size)
    cell = tl.floor(place)
    return cell, place - cell


@triton.jit
def _advance(pairs, entries):
    """Further on in the table by that many pairs."""
    return pairs + (entries if pairs.dtype.element_ty == tl.int64 else 2 * entries)


@triton.jit
def _bias(pairs, dy, dx, height, width):
    """Table read bilinearly at displacements / 4, zero outside; times LOG2E, as the table is."""
    y, down = _cell(dy, height)
    x, right = _cell(dx, width)
    at = (y * (width + 2) + x).to(tl.int32)  # may be negative: pairs is where cell (0, 0) is
    top_left, top_right = _load_pair(pairs, at)
    bottom_left, bottom_right = _load_pair(_advance(pairs, width + 2), at)
    left = top_left + down * (bottom_left - top_left)
    return left + right * (top_right + down * (bottom_right - top_right) - left)


@triton.jit
def _load_pair(pairs, at):
    """Two neighbors in a row of the table.

    float32 ones are read as the halves of one integer: reading the table takes the most time here,
    and this halves the accesses.
    """
    if pairs.dtype.element_ty == tl.int64:
        both = tl.load(pairs + at)
        left = both.to(tl.int32).to(tl.float32, bitcast=True)
        right = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        left, right = tl.load(pairs + 2 * at), tl.load(pairs + 2 * at + 1)
    return left, right


@triton.jit(do_not_specialize=['num_queries', 'num_keys', 'table_height', 'table_width'])
def _forward(
    q, q_strides, k, k_strides, v, v_strides, pairs, grid, positions, out, out_strides, lse,
    num_queries, num_keys, table_height, table_width, heads, heads_per_group,
    SCALE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one image and head, over all keys."""
    ACC: tl.constexpr = lse.dtype.element_ty
    image, head, tile = _program(tl.cdiv(num_queries, BLOCK_M), heads)
    pairs = _advance(pairs, head * ((table_height + 3) * (table_width + 2)) + table_width + 3)
    positions += (image * (heads // heads_per_group) + head // heads_per_group) * num_keys * 2
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < num_queries
    queries = load_tokens(_rows(q, q_strides, image, head, query), valid, D, BLOCK_D)
    y, x = _points(grid, query, valid)
    most = tl.full([BLOCK_M], float('-inf'), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    result = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, num_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        kept = key < num_keys
        keys = load_tokens(_rows(k, k_strides, image, head, key), kept, D, BLOCK_D)
        values = load_tokens(_rows(v, v_strides, image, head, key), kept, D, BLOCK_D)
        ky, kx = _points(positions, key, kept)
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
        scores += _bias(
            pairs, y[:, None] - ky[None, :], x[:, None] - kx[None, :], table_height, table_width
        )
        scores = tl.where(kept[None, :], scores, float('-inf'))
        new_most = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - new_most[:, None])
        fade = tl.exp2(most - new_most)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None] + dot(p.to(values.dtype), values)
        most = new_most
    token = (image * heads + head) * num_queries + query
    tl.store(lse + token, (most + tl.log2(total)) / LOG2E, mask=valid)
    rows = _rows(out, out_strides, image, head, query)
    store_tokens(rows, result / total[:, None], valid, D, BLOCK_D)


@triton.jit(do_not_specialize=['num_queries', 'num_keys', 'table_height', 'table_width'])
def _backward_query(
    q, q_strides, k, k_strides, v, v_strides, pairs, grid, positions, grad, grad_strides,
    out, out_strides, lse, delta, dq,
    num_queries, num_keys, table_height, table_width, heads, heads_per_group,
    SCALE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one image and head; and delta, grad . out of a query."""
    ACC: tl.constexpr = lse.dtype.element_ty
    image, head, tile = _program(tl.cdiv(num_queries, BLOCK_M), heads)
    pairs = _advance(pairs, head * ((table_height + 3) * (table_width + 2)) + table_width + 3)
    positions += (image * (heads // heads_per_group) + head // heads_per_group) * num_keys * 2
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < num_queries
    queries = load_tokens(_rows(q, q_strides, image, head, query), valid, D, BLOCK_D)
    d_out = load_tokens(_rows(grad, grad_strides, image, head, query), valid, D, BLOCK_D)
    y, x = _points(grid, query, valid)
    token = (image * heads + head) * num_queries + query
    result = load_tokens(_rows(out, out_strides, image, head, query), valid, D, BLOCK_D)
    d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
    tl.store(delta + token, d_total, mask=valid)
    log_total = (
        tl.load(lse + token, mask=valid, other=float('inf')) * LOG2E
    )  # no weight without a query
    d_query = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, num_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        kept = key < num_keys
        keys = load_tokens(_rows(k, k_strides, image, head, key), kept, D, BLOCK_D)
        values = load_tokens(_rows(v, v_strides, image, head, key), kept, D, BLOCK_D)
        ky, kx = _points(positions, key, kept)
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
        scores += _bias(
            pairs, y[:, None] - ky[None, :], x[:, None] - kx[None, :], table_height, table_width
        )
        scores = tl.where(kept[None, :], scores, float('-inf'))
        p = tl.exp2(scores - log_total[:, None])
        d_scores = p * (dot(d_out, tl.trans(values)) - d_total[:, None])
        d_query += dot(d_scores.to(keys.dtype), keys)
    store_tokens(dq + token * D, d_query * SCALE, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=['num_queries', 'num_keys', 'table_height', 'table_width'])
def _backward_key(
    q, q_strides, k, k_strides, v, v_strides, pairs, grid, positions, grad, grad_strides,
    lse, delta, dk, dv,
    num_queries, num_keys, table_height, table_width, heads, heads_per_group,
    SCALE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one image and head, over all queries."""
    ACC: tl.constexpr = lse.dtype.element_ty
    image, head, tile = _program(tl.cdiv(num_keys, BLOCK_N), heads)
    pairs = _advance(pairs, head * ((table_height + 3) * (table_width + 2)) + table_width + 3)
    positions += (image * (heads // heads_per_group) + head // heads_per_group) * num_keys * 2
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = key < num_keys
    keys = load_tokens(_rows(k, k_strides, image, head, key), kept, D, BLOCK_D)
    values = load_tokens(_rows(v, v_strides, image, head, key), kept, D, BLOCK_D)
    ky, kx = _points(positions, key, kept)
    d_key, d_value = tl.zeros([BLOCK_N, BLOCK_D], ACC), tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start in range(0, num_queries, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        valid = query < num_queries
        queries = load_tokens(_rows(q, q_strides, image, head, query), valid, D, BLOCK_D)
        d_out = load_tokens(_rows(grad, grad_strides, image, head, query), valid, D, BLOCK_D)
        y, x = _points(grid, query, valid)
        token = (image * heads + head) * num_queries + query
        log_total = tl.load(lse + token, mask=valid, other=float('inf')) * LOG2E
        d_total = tl.load(delta + token, mask=valid, other=0.0)
        # Keys down, queries across: the weights are then the left operand of both sums over the
        # queries.
        scores = dot(keys, tl.trans(queries)) * (SCALE * LOG2E)
        scores += _bias(
            pairs, y[None, :] - ky[:, None], x[None, :] - kx[:, None], table_height, table_width
        )
        p = tl.exp2(scores - log_total[None, :])
        d_value += dot(p.to(d_out.dtype), d_out)
        d_scores = p * (dot(values, tl.trans(d_out)) - d_total[None, :])
        d_key += dot(d_scores.to(queries.dtype), queries)
    token = (image * heads + head) * num_keys + key
    store_tokens(dk + token * D, d_key * SCALE, kept, D, BLOCK_D)
    store_tokens(dv + token * D, d_value, kept, D, BLOCK_D)
