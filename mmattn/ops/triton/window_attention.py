"""Window attention in Triton: tiles with online softmax, the map read and written in place.

The tiling, and scores that the backward pass makes again from the log-sum-exp instead of reading them, are
FlashAttention's (arXiv 2205.14135); windows and shift Swin's (2103.14030), the shared query GC ViT's
(2206.09959). Padding, shift and partition are index arithmetic: a program asks where each token of its
window lies in the map, and takes the padding's key and value for those that lie outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, choose_tile, device_of, dot, last_contiguous

# About how many programs share the windows of a batch where one program goes through several of them. Enough
# to fill the multiprocessors of a large GPU several times over; fixed, so that sums have one order on every
# GPU.
_PROGRAMS = 1024


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_k: Tensor,
    pad_v: Tensor,
    window_size: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T / sqrt(d) + bias) v`` within the windows of a map, as ``mmattn.ops.window_attention``.

    Args:
        q: queries, (B, H, W, heads, d); or (B, window_size, window_size, heads, d), shared by all windows of
            an image. Any strides but the last, as k and v; float16, bfloat16, float32 or float64, all alike.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        bias: (heads, N, N) for N = window_size**2, query first; float32, float64 for float64 inputs.
        pad_k: key of what completes the last windows, (heads, d).
        pad_v: its value, (heads, d).
        window_size: side of a window in tokens.
        shift: by how many tokens the windows are shifted cyclically.

    Returns:
        The attention, (B, H, W, heads, d) in the dtype of ``v``, and the log-sum-exp of each token's scores,
        (B, H, W, heads) in the dtype of ``bias``; both contiguous.
    """
    launch = _Launch(q, k, window_size, shift)
    q, k, v, pad_k, pad_v = (last_contiguous(t) for t in (q, k, v, pad_k, pad_v))
    out = torch.empty(k.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty(k.shape[:-1], dtype=accumulator(q.dtype), device=q.device)
    if out.numel():
        with device_of(q):
            _forward[(launch.windows * launch.heads * launch.query_tiles,)](
                *launch.strided(q, k, v), *_heads(pad_k, pad_v), bias.contiguous(), out, lse, *launch.sizes,
                **launch.constants,
            )  # fmt: skip
    return out, lse


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
    """The gradients of :func:`window_attention_forward`. No atomics: the same inputs give the same bits.

    Args:
        grad: of ``out``, (B, H, W, heads, d).
        q, k, v, bias, pad_k, pad_v, window_size, shift: what the forward pass was given.
        out, lse: what it returned.

    Returns:
        The gradients of q (of a shared query: summed over the windows), k, v, bias, pad_k and pad_v; each
        contiguous, in the shape and dtype of what it belongs to.
    """
    launch = _Launch(q, k, window_size, shift)
    batch, heads, d = k.shape[0], launch.heads, k.shape[-1]
    if not k.numel():
        return tuple(torch.zeros_like(t).contiguous() for t in (q, k, v, bias, pad_k, pad_v))
    grad, q, k, v, pad_k, pad_v = (
        last_contiguous(t) for t in (grad.to(v.dtype), q, k, v, pad_k, pad_v)
    )
    kinds = dict(dtype=lse.dtype, device=q.device)
    per_image, n = launch.windows // batch, window_size**2
    shared = launch.constants['SHARED_QUERY']
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dpad_k, dpad_v = (
        torch.empty(launch.windows, launch.key_tiles, heads, d, **kinds) for _ in 'kv'
    )
    if shared:
        dq = torch.empty(batch, per_image, *q.shape[1:], **kinds)
    else:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty(lse.shape, **kinds)
    splits, share = launch.split()
    dbias = torch.empty(splits, heads, n, n, **kinds)
    inputs = (*launch.strided(q, k, v, grad), *_heads(pad_k, pad_v), bias.contiguous())
    with device_of(q):
        _backward_query[(launch.windows * heads * launch.query_tiles,)](
            *inputs, out.contiguous(), lse, delta, dq, *launch.sizes, **launch.constants
        )
        _backward_key[(launch.windows * heads * launch.key_tiles,)](
            *inputs, lse, delta, dk, dv, dpad_k, dpad_v, *launch.sizes, **launch.constants
        )
        _backward_bias[(splits * heads * launch.query_tiles * launch.key_tiles,)](
            *inputs, lse, delta, dbias, *launch.sizes, share, **launch.constants
        )
    if shared:
        dq = dq.sum(1).to(q.dtype)
    dpad_k, dpad_v = (t.sum((0, 1)).to(p.dtype) for t, p in ((dpad_k, pad_k), (dpad_v, pad_v)))
    return dq, dk, dv, dbias.sum(0), dpad_k, dpad_v


class _Launch:
    """What all kernels of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, window_size: int, shift: int):
        batch, height, width, self.heads, d = k.shape
        n = window_size**2
        self.windows = batch * triton.cdiv(height, window_size) * triton.cdiv(width, window_size)
        tile = choose_tile(n, n, d, q.dtype)
        self.query_tiles, self.key_tiles = triton.cdiv(n, tile.queries), triton.cdiv(n, tile.keys)
        self.sizes = (batch, height, width, self.heads)
        self.constants = dict(
            WINDOW=window_size,
            SHIFT=shift,
            SHARED_QUERY=q.shape[1:3] != k.shape[1:3],
            D=d,
            BLOCK_D=tile.channels,
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def split(self) -> tuple[int, int]:
        """Into how many shares the windows are divided for the bias's gradient, and windows of a share."""
        tiles = self.heads * self.query_tiles * self.key_tiles
        share = triton.cdiv(self.windows, min(self.windows, triton.cdiv(_PROGRAMS, tiles)))
        return triton.cdiv(self.windows, share), share

    @staticmethod
    def strided(*maps: Tensor):
        """Maps as the kernels take them: each with its strides of image, row, column and head."""
        for x in maps:
            yield from (x, x.stride()[:4])


def _heads(*tokens: Tensor):
    """Tokens (heads, d) as the kernels take them: each with its stride of heads."""
    for x in tokens:
        yield from (x, x.stride(0))


@triton.jit
def _program(tiles, batch, height, width, WINDOW: tl.constexpr):
    """Head, tile and window (counted through the batch) of this program, the window changing first: programs
    that run at once then read the same tiles of the bias, which are larger than their tokens."""
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    index, pair = tl.program_id(0) % windows, tl.program_id(0) // windows
    return pair // tiles, pair % tiles, index


@triton.jit
def _window(index, height, width, WINDOW: tl.constexpr):
    """Image, and row and column of windows, of a window counted through the batch; and the size of the padded
    map, in tokens."""
    window_rows, window_columns = tl.cdiv(height, WINDOW), tl.cdiv(width, WINDOW)
    column = index % window_columns
    row = (index // window_columns) % window_rows
    image = index // (window_columns * window_rows)
    return image.to(tl.int64), row, column, window_rows * WINDOW, window_columns * WINDOW


@triton.jit
def _place(n, index, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Where token n of a window lies: image, row and column; whether that is in the map (or is padding, or n is
    beyond the window); and which of the regions that the shift has brought together it belongs to."""
    image, row, column, rows, columns = _window(index, height, width, WINDOW)
    y, x = row * WINDOW + n // WINDOW, column * WINDOW + n % WINDOW
    region = 2 * (y >= rows - SHIFT).to(tl.int32) + (x >= columns - SHIFT).to(tl.int32)
    y, x = y + SHIFT, x + SHIFT
    y, x = tl.where(y >= rows, y - rows, y), tl.where(x >= columns, x - columns, x)
    inside = (n < WINDOW * WINDOW) & (y < height) & (x < width)
    return image, y.to(tl.int64), x.to(tl.int64), inside, region


@triton.jit
def _rows(x, strides, image, row, column, head):
    """Where the tokens of a map at (row, column) begin."""
    return x + image * strides[0] + row * strides[1] + column * strides[2] + head * strides[3]


@triton.jit
def _query_rows(q, strides, image, n, y, x, head, WINDOW: tl.constexpr, SHARED_QUERY: tl.constexpr):
    """Where the queries of a window's tokens n begin, which lie at (y, x) of the map."""
    if SHARED_QUERY:
        y, x = (n // WINDOW).to(tl.int64), (n % WINDOW).to(tl.int64)
    return _rows(q, strides, image, y, x, head)


@triton.jit
def _load(rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tokens that begin at ``rows``, (tokens, BLOCK_D); zero where they are not valid."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel[None, :] < D)
    return tl.load(rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store(rows, value, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel[None, :] < D)
    tl.store(rows[:, None] + channel[None, :], value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _store_padding(
    partial, value, n, inside, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sum of what the padding among the tokens n is given."""
    channel = tl.arange(0, BLOCK_D)
    padding = (n < WINDOW * WINDOW) & ~inside
    total = tl.sum(tl.where(padding[:, None], value, 0.0), 0)
    tl.store(partial + channel, total, mask=channel < D)


@triton.jit
def _load_bias(bias, head, query, key, WINDOW: tl.constexpr):
    """The bias of a tile of scores, -inf for keys beyond the window. Queries beyond it repeat the last one: they
    get scores like others, and what comes of them is not stored."""
    N: tl.constexpr = WINDOW * WINDOW
    address = bias + head * (N * N) + tl.minimum(query, N - 1) * N + key
    return tl.load(address, mask=(key < N) & (query >= 0), other=float('-inf'))


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _forward(
    q, q_strides, k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride, bias, out, lse,
    batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one window and head, over all keys of the window."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = _program(tl.cdiv(N, BLOCK_M), batch, height, width, WINDOW)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
    q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = _load(q_rows, inside, D, BLOCK_D)
    most = tl.full([BLOCK_M], float('-inf'), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    result = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        # The padding is chosen by its address: no tile has to pass through registers on its way to shared memory.
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = _load(k_rows, key < N, D, BLOCK_D), _load(v_rows, key < N, D, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * SCALE
        scores += _load_bias(bias, head, query[:, None], key[None, :], WINDOW)
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0)
        new_most = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp(scores - new_most[:, None])
        fade = tl.exp(most - new_most)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None] + dot(p.to(values.dtype), values)
        most = new_most
    token = ((image * height + y) * width + x) * heads + head
    tl.store(lse + token, most + tl.log(total), mask=inside)
    _store(out + token * D, result / total[:, None], inside, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _backward_query(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse, delta, dq, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one window and head; and delta, grad . out of each token.

    A shared query's gradient is left for each window, (B, windows, WINDOW, WINDOW, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = _program(tl.cdiv(N, BLOCK_M), batch, height, width, WINDOW)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
    q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = _load(q_rows, inside, D, BLOCK_D)
    d_out = _load(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
    token = ((image * height + y) * width + x) * heads + head
    result = _load(out + token * D, inside, D, BLOCK_D)
    d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
    tl.store(delta + token, d_total, mask=inside)
    log_total = tl.load(lse + token, mask=inside, other=float('inf'))  # no weight without a query
    d_query = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = _load(k_rows, key < N, D, BLOCK_D), _load(v_rows, key < N, D, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * SCALE
        scores += _load_bias(bias, head, query[:, None], key[None, :], WINDOW)
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0)
        p = tl.exp(scores - log_total[:, None])
        d_scores = p * (dot(d_out, tl.trans(values)) - d_total[:, None])
        d_query += dot(d_scores.to(keys.dtype), keys)
    if SHARED_QUERY:
        to = dq + ((index.to(tl.int64) * N + query) * heads + head) * D
        _store(to, d_query * SCALE, query < N, D, BLOCK_D)
    else:
        _store(dq + token * D, d_query * SCALE, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _backward_key(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dk, dv, dpad_k, dpad_v, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one window and head.

    Those of the padding are summed for each tile, (windows, tiles, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    head, tile, index = _program(tiles, batch, height, width, WINDOW)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    image, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
    k_rows = tl.where(kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride)
    v_rows = tl.where(kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride)
    keys, values = _load(k_rows, key < N, D, BLOCK_D), _load(v_rows, key < N, D, BLOCK_D)
    d_key, d_value = tl.zeros([BLOCK_N, BLOCK_D], ACC), tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start in range(0, N, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        _, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
        q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = _load(q_rows, inside, D, BLOCK_D)
        d_out = _load(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf'))
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        # Keys down, queries across: the weights are then the left operand of both sums over the queries.
        scores = dot(keys, tl.trans(queries)) * SCALE
        scores += tl.trans(_load_bias(bias, head, query[:, None], key[None, :], WINDOW))
        if SHIFT > 0:
            scores += tl.where(key_region[:, None] == region[None, :], 0.0, -100.0)
        p = tl.exp(scores - log_total[None, :])
        d_value += dot(p.to(d_out.dtype), d_out)
        d_scores = p * (dot(values, tl.trans(d_out)) - d_total[None, :])
        d_key += dot(d_scores.to(queries.dtype), queries)
    d_key *= SCALE
    token = ((image * height + ky) * width + kx) * heads + head
    _store(dk + token * D, d_key, kept, D, BLOCK_D)
    _store(dv + token * D, d_value, kept, D, BLOCK_D)
    partial = ((index.to(tl.int64) * tiles + tile) * heads + head) * D
    _store_padding(dpad_k + partial, d_key, key, kept, WINDOW, D, BLOCK_D)
    _store_padding(dpad_v + partial, d_value, key, kept, WINDOW, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'share'])
def _backward_bias(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dbias, batch, height, width, heads, share,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one head's bias, summed over ``share`` windows: (shares, heads, N, N)."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    key_tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    tiles: tl.constexpr = tl.cdiv(N, BLOCK_M) * key_tiles
    split, head = tl.program_id(0) // (tiles * heads), (tl.program_id(0) // tiles) % heads
    tile = tl.program_id(0) % tiles
    query = tile // key_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_bias = _load_bias(bias, head, query[:, None], key[None, :], WINDOW)
    d_bias = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    for index in range(split * share, tl.minimum((split + 1) * share, windows)):
        image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = _load(q_rows, inside, D, BLOCK_D)
        d_out = _load(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf'))
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = _load(k_rows, key < N, D, BLOCK_D), _load(v_rows, key < N, D, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * SCALE + tile_bias
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0)
        p = tl.exp(scores - log_total[:, None])
        d_bias += p * (dot(d_out, tl.trans(values)) - d_total[:, None])
    row = (split.to(tl.int64) * heads + head) * (N * N) + query[:, None] * N
    mask = (query[:, None] < N) & (key[None, :] < N)
    tl.store(dbias + row + key[None, :], d_bias, mask=mask)
