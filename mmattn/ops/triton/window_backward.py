"""Backward pass of window attention in Triton.

The probabilities are recomputed from the saved log-sum-exp, as in FlashAttention (arXiv
2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, device_of, dot, last_contiguous, load_tokens, store_tokens
from ._window import (
    WindowLaunch,
    heads_of,
    load_bias,
    load_keys,
    masked_scores,
    place,
    program,
    query_rows,
    rows,
)


def window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_k: Tensor,
    pad_v: Tensor,
    out: Tensor,
    lse: Tensor,
    window_size: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`window_attention_forward`; deterministic.

    Args:
        grad: of ``out``, (B, H, W, heads, d).
        q, k, v, bias, pad_k, pad_v, window_size, shift: what the forward pass was given.
        out, lse: what it returned.

    Returns:
        The gradients of q (of a shared query: summed over the windows), k, v, bias, pad_k and
        pad_v; each contiguous, in the shape and dtype of what it belongs to.
    """
    if not k.numel():
        dq, dk, dv, dbias, dpad_k, dpad_v = (
            torch.zeros_like(t).contiguous() for t in (q, k, v, bias, pad_k, pad_v)
        )
        return dq, dk, dv, dbias, dpad_k, dpad_v
    launch = WindowLaunch(q, k, window_size, shift)
    batch, heads, d = k.shape[0], launch.heads, k.shape[-1]
    grad, q, k, v, pad_k, pad_v = (
        last_contiguous(t) for t in (grad.to(v.dtype), q, k, v, pad_k, pad_v)
    )
    kinds: dict[str, Any] = dict(dtype=lse.dtype, device=q.device)
    n, parts = window_size**2, launch.parts
    shared = launch.constants['SHARED_QUERY']
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dbias = torch.empty(parts, heads, n, n, **kinds)
    dpad_k, dpad_v = (torch.empty(launch.pad_parts, heads, d, **kinds) for _ in 'kv')
    if shared:
        dq = torch.empty(batch, launch.query_parts, *q.shape[1:], **kinds)
    else:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    maps = *launch.strided(q, k, v, grad), *heads_of(pad_k, pad_v)
    inputs = *maps, launch.bias(bias)
    of_keys = dk, dv, dpad_k, dpad_v
    out, sizes, share = out.contiguous(), launch.sizes, launch.share
    with device_of(q):
        if launch.tiles == 1:
            launch.run(
                _backward_whole, parts, *inputs, out, lse, dq, dbias, *of_keys, *sizes, share
            )
        else:
            programs = launch.windows * launch.tiles
            delta = torch.empty(lse.shape, **kinds)
            launch.run(_backward_query, programs, *inputs, out, lse, delta, dq, *sizes)
            by_key = *maps, launch.bias(bias.transpose(1, 2))
            launch.run(_backward_key, programs, *by_key, lse, delta, *of_keys, *sizes)
            programs = parts * launch.tiles**2
            launch.run(_backward_bias, programs, *inputs, lse, delta, dbias, *sizes, share)
    if shared:
        dq = dq.sum(1).to(q.dtype)
    dpad_k, dpad_v = dpad_k.sum(0).to(pad_k.dtype), dpad_v.sum(0).to(pad_v.dtype)
    return dq, dk, dv, dbias.sum(0), dpad_k, dpad_v


@triton.jit
def _store_padding(
    partial, value, n, inside, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sum of what the padding among the tokens n is given."""
    channel = tl.arange(0, BLOCK_D)
    padding = (n < WINDOW * WINDOW) & ~inside
    total = tl.sum(tl.where(padding[:, None], value, 0.0), 0)
    tl.store(partial + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _backward_query(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides,
    pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse, delta, dq, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one window and head; and delta, grad . out of a token.

    A shared query's gradient is left for each window, (B, windows, WINDOW, WINDOW, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = program(tl.cdiv(N, BLOCK), batch, height, width, WINDOW)
    query = tile * BLOCK + tl.arange(0, BLOCK)
    image, y, x, inside, region = place(query, index, height, width, WINDOW, SHIFT)
    q_rows = query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = load_tokens(q_rows, inside, D, BLOCK_D)
    d_out = load_tokens(rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
    token = ((image * height + y) * width + x) * heads + head
    result = load_tokens(out + token * D, inside, D, BLOCK_D)
    d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
    tl.store(delta + token, d_total, mask=inside)
    # No weight without a query.
    log_total = tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
    d_query = tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        key = start + tl.arange(0, BLOCK)
        _, ky, kx, kept, key_region = place(key, index, height, width, WINDOW, SHIFT)
        keys, values = load_keys(
            k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
            image, key, ky, kx, kept, head, WINDOW, D, BLOCK_D,
        )  # fmt: skip
        tile_bias = load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
        scores = masked_scores(queries, keys, tile_bias, region, key_region, SCALE, SHIFT)
        p = tl.exp2(scores - log_total[:, None])
        d_scores = p * (dot(d_out, tl.trans(values)) - d_total[:, None])
        d_query += dot(d_scores.to(keys.dtype), keys)
    if SHARED_QUERY:
        to = dq + ((index.to(tl.int64) * N + query) * heads + head) * D
        store_tokens(to, d_query * SCALE, query < N, D, BLOCK_D)
    else:
        store_tokens(dq + token * D, d_query * SCALE, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _backward_key(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides,
    pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dk, dv, dpad_k, dpad_v, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one window and head.

    Here the bias comes with keys down, too. The gradients of the padding are summed for each tile,
    (windows, tiles, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK  # tl.cdiv makes no constant in every Triton
    head, tile, index = program(tiles, batch, height, width, WINDOW)
    key = tile * BLOCK + tl.arange(0, BLOCK)
    image, ky, kx, kept, key_region = place(key, index, height, width, WINDOW, SHIFT)
    keys, values = load_keys(
        k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
        image, key, ky, kx, kept, head, WINDOW, D, BLOCK_D,
    )  # fmt: skip
    d_key, d_value = tl.zeros([BLOCK, BLOCK_D], ACC), tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        query = start + tl.arange(0, BLOCK)
        _, y, x, inside, region = place(query, index, height, width, WINDOW, SHIFT)
        q_rows = query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        d_out = load_tokens(rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        # Keys down, queries across: the weights are then the left operand of both sums over the
        # queries.
        tile_bias = load_bias(bias, head, key[:, None], query[None, :], WINDOW, BLOCK)
        scores = masked_scores(keys, queries, tile_bias, key_region, region, SCALE, SHIFT)
        p = tl.exp2(scores - log_total[None, :])
        d_value += dot(p.to(d_out.dtype), d_out)
        d_scores = p * (dot(values, tl.trans(d_out)) - d_total[None, :])
        d_key += dot(d_scores.to(queries.dtype), queries)
    d_key *= SCALE
    token = ((image * height + ky) * width + kx) * heads + head
    store_tokens(dk + token * D, d_key, kept, D, BLOCK_D)
    store_tokens(dv + token * D, d_value, kept, D, BLOCK_D)
    partial = ((index.to(tl.int64) * tiles + tile) * heads + head) * D
    _store_padding(dpad_k + partial, d_key, key, kept, WINDOW, D, BLOCK_D)
    _store_padding(dpad_v + partial, d_value, key, kept, WINDOW, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'share'])
def _backward_bias(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides,
    pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dbias, batch, height, width, heads, share,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of one head's bias, over ``share`` windows: (shares, heads, N, N)."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    key_tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK  # tl.cdiv makes no constant in every Triton
    tiles: tl.constexpr = tl.cdiv(N, BLOCK) * key_tiles
    split, head = tl.program_id(0) // (tiles * heads), (tl.program_id(0) // tiles) % heads
    tile = tl.program_id(0) % tiles
    query = tile // key_tiles * BLOCK + tl.arange(0, BLOCK)
    key = tile % key_tiles * BLOCK + tl.arange(0, BLOCK)
    tile_bias = load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
    d_bias = tl.zeros([BLOCK, BLOCK], ACC)
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    for index in range(split * share, tl.minimum((split + 1) * share, windows)):
        image, y, x, inside, region = place(query, index, height, width, WINDOW, SHIFT)
        _, ky, kx, kept, key_region = place(key, index, height, width, WINDOW, SHIFT)
        q_rows = query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        d_out = load_tokens(rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        keys, values = load_keys(
            k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
            image, key, ky, kx, kept, head, WINDOW, D, BLOCK_D,
        )  # fmt: skip
        scores = masked_scores(queries, keys, tile_bias, region, key_region, SCALE, SHIFT)
        p = tl.exp2(scores - log_total[:, None])
        d_bias += p * (dot(d_out, tl.trans(values)) - d_total[:, None])
    row = (split.to(tl.int64) * heads + head) * (N * N) + query[:, None] * N
    mask = (query[:, None] < N) & (key[None, :] < N)
    tl.store(dbias + row + key[None, :], d_bias, mask=mask)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'share'])
def _backward_whole(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides,
    pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse, dq, dbias, dk, dv, dpad_k, dpad_v, batch, height, width, heads, share,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of one head in ``share`` windows, each of which is a single tile.

    Those of the bias and of the padding are summed over the share, (shares, heads, ...), and so is
    that of a shared query, (shares, WINDOW, WINDOW, heads, D); the windows of a share are then of
    one image.
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, split = tl.program_id(0) % heads, tl.program_id(0) // heads
    token = tl.arange(0, BLOCK)
    tile_bias = load_bias(bias, head, token[:, None], token[None, :], WINDOW, BLOCK)
    d_bias = tl.zeros([BLOCK, BLOCK], ACC)
    d_query = tl.zeros([BLOCK, BLOCK_D], ACC)
    d_pad_k, d_pad_v = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    if SHARED_QUERY:
        splits = tl.cdiv(windows, share)
        first = split // splits * windows + split % splits * share
        last = tl.minimum(first + share, (split // splits + 1) * windows)
    else:
        first = split * share
        last = tl.minimum(first + share, batch * windows)
    padded = windows * N > height * width
    for index in range(first, last):
        image, y, x, inside, region = place(token, index, height, width, WINDOW, SHIFT)
        q_rows = query_rows(q, q_strides, image, token, y, x, head, WINDOW, SHARED_QUERY)
        at = ((image * height + y) * width + x) * heads + head
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        keys, values = load_keys(
            k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
            image, token, y, x, inside, head, WINDOW, D, BLOCK_D,
        )  # fmt: skip
        d_out = load_tokens(rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        result = load_tokens(out + at * D, inside, D, BLOCK_D)
        d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
        log_total = tl.load(lse + at, mask=inside, other=float('inf')) * LOG2E
        scores = masked_scores(queries, keys, tile_bias, region, region, SCALE, SHIFT)
        p = tl.exp2(scores - log_total[:, None])
        d_value = dot(tl.trans(p.to(d_out.dtype)), d_out)
        d_scores = p * (dot(d_out, tl.trans(values)) - d_total[:, None])
        d_bias += d_scores
        d_scores = d_scores.to(keys.dtype)
        d_key = dot(tl.trans(d_scores), queries) * SCALE
        store_tokens(dk + at * D, d_key, inside, D, BLOCK_D)
        store_tokens(dv + at * D, d_value, inside, D, BLOCK_D)
        if padded:
            padding = (token < N) & ~inside
            d_pad_k += tl.sum(tl.where(padding[:, None], d_key, 0.0), 0)
            d_pad_v += tl.sum(tl.where(padding[:, None], d_value, 0.0), 0)
        if SHARED_QUERY:
            d_query += dot(d_scores, keys)
        else:
            store_tokens(dq + at * D, dot(d_scores, keys) * SCALE, inside, D, BLOCK_D)
    part = split.to(tl.int64) * heads + head
    if SHARED_QUERY:
        to = dq + ((split.to(tl.int64) * N + token) * heads + head) * D
        store_tokens(to, d_query * SCALE, token < N, D, BLOCK_D)
    mask = (token[:, None] < N) & (token[None, :] < N)
    tl.store(dbias + part * (N * N) + token[:, None] * N + token[None, :], d_bias, mask=mask)
    channel = tl.arange(0, BLOCK_D)
    tl.store(dpad_k + part * D + channel, d_pad_k, mask=channel < D)
    tl.store(dpad_v + part * D + channel, d_pad_v, mask=channel < D)
