"""Window attention in Triton: tiles with online softmax, the map read and written in place.

The tiling, and scores that the backward pass makes again from the log-sum-exp instead of reading them, are
FlashAttention's (arXiv 2205.14135); windows and shift Swin's (2103.14030), the shared query GC ViT's
(2206.09959). Padding, shift and partition are index arithmetic: a program asks where each token of its
window lies in the map, and takes the padding's key and value for those that lie outside.
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
    q, k, v, pad_k, pad_v = (last_contiguous(t) for t in (q, k, v, pad_k, pad_v))
    out = torch.empty(k.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty(k.shape[:-1], dtype=accumulator(q.dtype), device=q.device)
    if out.numel():
        launch = _Launch(q, k, window_size, shift)
        inputs = (*launch.strided(q, k, v), *_heads(pad_k, pad_v), launch.bias(bias))
        with device_of(q):
            launch.run(_forward, launch.windows * launch.tiles, *inputs, out, lse, *launch.sizes)
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
    if not k.numel():
        return tuple(torch.zeros_like(t).contiguous() for t in (q, k, v, bias, pad_k, pad_v))
    launch = _Launch(q, k, window_size, shift)
    batch, heads, d = k.shape[0], launch.heads, k.shape[-1]
    grad, q, k, v, pad_k, pad_v = (
        last_contiguous(t) for t in (grad.to(v.dtype), q, k, v, pad_k, pad_v)
    )
    kinds = dict(dtype=lse.dtype, device=q.device)
    n, parts = window_size**2, launch.parts
    shared = launch.constants['SHARED_QUERY']
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dbias = torch.empty(parts, heads, n, n, **kinds)
    dpad_k, dpad_v = (torch.empty(launch.pad_parts, heads, d, **kinds) for _ in 'kv')
    if shared:
        dq = torch.empty(batch, launch.query_parts, *q.shape[1:], **kinds)
    else:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    maps = *launch.strided(q, k, v, grad), *_heads(pad_k, pad_v)
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


class _Launch:
    """What all kernels of one call have in common.

    Attributes:
        windows: windows of the batch.
        tiles: tiles of a window's queries, and of its keys.
        share: windows that one program goes through, where programs go through several.
        parts: shares into which the windows are divided.
        query_parts: parts of an image in which the gradient of a shared query is summed.
        pad_parts: parts in which the gradients of the padding are.
    """

    def __init__(self, q: Tensor, k: Tensor, window_size: int, shift: int):
        batch, height, width, self.heads, d = k.shape
        n = window_size**2
        per_image = triton.cdiv(height, window_size) * triton.cdiv(width, window_size)
        self.windows = batch * per_image
        tile = choose_tile(n, n, d, q.dtype, gathers=False)
        self.tiles = triton.cdiv(n, tile.own)
        self.sizes = (batch, height, width, self.heads)
        shared = q.shape[1:3] != k.shape[1:3]
        # A program that sums a shared query's gradient stays within the image.
        joined = per_image if shared and self.tiles == 1 else self.windows
        groups = self.windows // joined
        wanted = triton.cdiv(_PROGRAMS, self.heads * self.tiles**2 * groups)
        self.share = triton.cdiv(joined, min(joined, wanted))
        self.parts = groups * triton.cdiv(joined, self.share)
        if self.tiles == 1:
            self.query_parts, self.pad_parts = self.parts // groups, self.parts
        else:
            self.query_parts, self.pad_parts = per_image, self.windows * self.tiles
        self.constants = dict(
            WINDOW=window_size,
            SHIFT=shift,
            SHARED_QUERY=shared,
            D=d,
            BLOCK_D=tile.channels,
            BLOCK=tile.own,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def bias(self, bias: Tensor) -> Tensor:
        """The bias, or its transpose, times LOG2E, each row filled up to whole tiles with -inf: what is beyond the
        window gets no weight, and rows of odd windows are aligned for wide loads."""
        beyond = self.tiles * self.constants['BLOCK'] - bias.shape[2]
        return F.pad(bias * LOG2E.value, (0, beyond), value=float('-inf')).contiguous()

    def run(self, kernel, programs: int, *arguments):
        """Run that many programs of a kernel for each head."""
        kernel[(programs * self.heads,)](*arguments, **self.constants)

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
    """Head, tile and window (counted through the batch) of this program. The tile changes first and the head
    last: programs that run at once share the tokens of few windows and the bias of one head."""
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return pair // windows, tile, pair % windows


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
    x += image * strides[0] + head.to(tl.int64) * strides[3]
    return x + row * strides[1] + column * strides[2]


@triton.jit
def _query_rows(q, strides, image, n, y, x, head, WINDOW: tl.constexpr, SHARED_QUERY: tl.constexpr):
    """Where the queries of a window's tokens n begin, which lie at (y, x) of the map."""
    if SHARED_QUERY:
        y, x = (n // WINDOW).to(tl.int64), (n % WINDOW).to(tl.int64)
    return _rows(q, strides, image, y, x, head)


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
def _load_bias(bias, head, row, column, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of what :meth:`_Launch.bias` makes. Rows beyond the window repeat the last one: these tokens get
    scores like others, and what comes of them is not stored."""
    N: tl.constexpr = WINDOW * WINDOW
    ROW: tl.constexpr = tl.cdiv(N, BLOCK) * BLOCK
    return tl.load(bias + (head * N + tl.minimum(row, N - 1)) * ROW + column)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _forward(
    q, q_strides, k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride, bias, out, lse,
    batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one window and head, over all keys of the window."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = _program(tl.cdiv(N, BLOCK), batch, height, width, WINDOW)
    query = tile * BLOCK + tl.arange(0, BLOCK)
    image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
    q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = load_tokens(q_rows, inside, D, BLOCK_D)
    most = tl.full([BLOCK], float('-inf'), ACC)
    total = tl.zeros([BLOCK], ACC)
    result = tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        key = start + tl.arange(0, BLOCK)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        # The padding is chosen by its address: no tile has to pass through registers on its way to shared memory.
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = (
            load_tokens(k_rows, key < N, D, BLOCK_D),
            load_tokens(v_rows, key < N, D, BLOCK_D),
        )
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
        scores += _load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0 * LOG2E)
        new_most = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - new_most[:, None])
        fade = tl.exp2(most - new_most)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None] + dot(p.to(values.dtype), values)
        most = new_most
    token = ((image * height + y) * width + x) * heads + head
    tl.store(lse + token, (most + tl.log2(total)) / LOG2E, mask=inside)
    store_tokens(out + token * D, result / total[:, None], inside, D, BLOCK_D)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _backward_query(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse, delta, dq, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one window and head; and delta, grad . out of each token.

    A shared query's gradient is left for each window, (B, windows, WINDOW, WINDOW, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = _program(tl.cdiv(N, BLOCK), batch, height, width, WINDOW)
    query = tile * BLOCK + tl.arange(0, BLOCK)
    image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
    q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = load_tokens(q_rows, inside, D, BLOCK_D)
    d_out = load_tokens(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
    token = ((image * height + y) * width + x) * heads + head
    result = load_tokens(out + token * D, inside, D, BLOCK_D)
    d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
    tl.store(delta + token, d_total, mask=inside)
    log_total = (
        tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
    )  # no weight without a query
    d_query = tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        key = start + tl.arange(0, BLOCK)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = (
            load_tokens(k_rows, key < N, D, BLOCK_D),
            load_tokens(v_rows, key < N, D, BLOCK_D),
        )
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
        scores += _load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0 * LOG2E)
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
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dk, dv, dpad_k, dpad_v, batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one window and head.

    Here the bias comes with keys down, too. The gradients of the padding are summed for each tile, (windows,
    tiles, heads, D).
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK  # tl.cdiv makes no constant in every Triton
    head, tile, index = _program(tiles, batch, height, width, WINDOW)
    key = tile * BLOCK + tl.arange(0, BLOCK)
    image, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
    k_rows = tl.where(kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride)
    v_rows = tl.where(kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride)
    keys, values = (
        load_tokens(k_rows, key < N, D, BLOCK_D),
        load_tokens(v_rows, key < N, D, BLOCK_D),
    )
    d_key, d_value = tl.zeros([BLOCK, BLOCK_D], ACC), tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        query = start + tl.arange(0, BLOCK)
        _, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
        q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        d_out = load_tokens(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        # Keys down, queries across: the weights are then the left operand of both sums over the queries.
        scores = dot(keys, tl.trans(queries)) * (SCALE * LOG2E)
        scores += _load_bias(bias, head, key[:, None], query[None, :], WINDOW, BLOCK)
        if SHIFT > 0:
            scores += tl.where(key_region[:, None] == region[None, :], 0.0, -100.0 * LOG2E)
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
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, lse, delta, dbias, batch, height, width, heads, share,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one head's bias, summed over ``share`` windows: (shares, heads, N, N)."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    key_tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK  # tl.cdiv makes no constant in every Triton
    tiles: tl.constexpr = tl.cdiv(N, BLOCK) * key_tiles
    split, head = tl.program_id(0) // (tiles * heads), (tl.program_id(0) // tiles) % heads
    tile = tl.program_id(0) % tiles
    query = tile // key_tiles * BLOCK + tl.arange(0, BLOCK)
    key = tile % key_tiles * BLOCK + tl.arange(0, BLOCK)
    tile_bias = _load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
    d_bias = tl.zeros([BLOCK, BLOCK], ACC)
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    for index in range(split * share, tl.minimum((split + 1) * share, windows)):
        image, y, x, inside, region = _place(query, index, height, width, WINDOW, SHIFT)
        _, ky, kx, kept, key_region = _place(key, index, height, width, WINDOW, SHIFT)
        q_rows = _query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        d_out = load_tokens(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        token = ((image * height + y) * width + x) * heads + head
        log_total = tl.load(lse + token, mask=inside, other=float('inf')) * LOG2E
        d_total = tl.load(delta + token, mask=inside, other=0.0)
        k_rows = tl.where(
            kept, _rows(k, k_strides, image, ky, kx, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            kept, _rows(v, v_strides, image, ky, kx, head), pad_v + head * pad_v_stride
        )
        keys, values = (
            load_tokens(k_rows, key < N, D, BLOCK_D),
            load_tokens(v_rows, key < N, D, BLOCK_D),
        )
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E) + tile_bias
        if SHIFT > 0:
            scores += tl.where(region[:, None] == key_region[None, :], 0.0, -100.0 * LOG2E)
        p = tl.exp2(scores - log_total[:, None])
        d_bias += p * (dot(d_out, tl.trans(values)) - d_total[:, None])
    row = (split.to(tl.int64) * heads + head) * (N * N) + query[:, None] * N
    mask = (query[:, None] < N) & (key[None, :] < N)
    tl.store(dbias + row + key[None, :], d_bias, mask=mask)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'share'])
def _backward_whole(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse, dq, dbias, dk, dv, dpad_k, dpad_v, batch, height, width, heads, share,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of one head in ``share`` windows, one after the other, each of which is a single tile.

    Those of the bias and of the padding are summed over the share, (shares, heads, ...), and so is that of a
    shared query, (shares, WINDOW, WINDOW, heads, D); the windows of a share are then of one image.
    """
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, split = tl.program_id(0) % heads, tl.program_id(0) // heads
    token = tl.arange(0, BLOCK)
    tile_bias = _load_bias(bias, head, token[:, None], token[None, :], WINDOW, BLOCK)
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
        image, y, x, inside, region = _place(token, index, height, width, WINDOW, SHIFT)
        q_rows = _query_rows(q, q_strides, image, token, y, x, head, WINDOW, SHARED_QUERY)
        k_rows = tl.where(
            inside, _rows(k, k_strides, image, y, x, head), pad_k + head * pad_k_stride
        )
        v_rows = tl.where(
            inside, _rows(v, v_strides, image, y, x, head), pad_v + head * pad_v_stride
        )
        at = ((image * height + y) * width + x) * heads + head
        queries = load_tokens(q_rows, inside, D, BLOCK_D)
        keys, values = (
            load_tokens(k_rows, token < N, D, BLOCK_D),
            load_tokens(v_rows, token < N, D, BLOCK_D),
        )
        d_out = load_tokens(_rows(grad, grad_strides, image, y, x, head), inside, D, BLOCK_D)
        result = load_tokens(out + at * D, inside, D, BLOCK_D)
        d_total = tl.sum(d_out.to(ACC) * result.to(ACC), 1)
        log_total = tl.load(lse + at, mask=inside, other=float('inf')) * LOG2E
        scores = dot(queries, tl.trans(keys)) * (SCALE * LOG2E) + tile_bias
        if SHIFT > 0:
            scores += tl.where(region[:, None] == region[None, :], 0.0, -100.0 * LOG2E)
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
