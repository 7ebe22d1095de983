"""Forward pass of window attention in Triton: tiles with online softmax.

The tiling is FlashAttention's (arXiv 2205.14135), windows and shift are Swin's (2103.14030), and
the shared query is GC ViT's (2206.09959).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, accumulator, device_of, dot, last_contiguous, load_tokens, store_tokens
from ._window import (
    WindowLaunch,
    heads_of,
    load_bias,
    load_keys,
    masked_scores,
    place,
    program,
    query_rows,
)


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
    """``softmax(q k^T / sqrt(d) + bias) v`` in windows, as ``mmattn.ops.window_attention``.

    Args:
        q: queries, (B, H, W, heads, d); or (B, window_size, window_size, heads, d), shared by all
            windows of an image. Any strides but the last, as k and v; float16, bfloat16, float32 or
            float64, all alike.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        bias: (heads, N, N) for N = window_size**2, query first; float32 (float64 for float64).
        pad_k: key of the padding, (heads, d).
        pad_v: value of the padding, (heads, d).
        window_size: height and width of a window in tokens.
        shift: cyclic shift of the windows in tokens.

    Returns:
        The attention, (B, H, W, heads, d) in the dtype of ``v``, and the log-sum-exp of each
        token's scores, (B, H, W, heads) in the dtype of ``bias``; both contiguous.
    """
    q, k, v, pad_k, pad_v = (last_contiguous(t) for t in (q, k, v, pad_k, pad_v))
    out = torch.empty(k.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty(k.shape[:-1], dtype=accumulator(q.dtype), device=q.device)
    if out.numel():
        launch = WindowLaunch(q, k, window_size, shift)
        inputs = (*launch.strided(q, k, v), *heads_of(pad_k, pad_v), launch.bias(bias))
        with device_of(q):
            launch.run(_forward, launch.windows * launch.tiles, *inputs, out, lse, *launch.sizes)
    return out, lse


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def _forward(
    q, q_strides, k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    bias, out, lse,
    batch, height, width, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, SHARED_QUERY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one window and head, over all keys of the window."""
    N: tl.constexpr = WINDOW * WINDOW
    SCALE: tl.constexpr = D**-0.5
    ACC: tl.constexpr = lse.dtype.element_ty
    head, tile, index = program(tl.cdiv(N, BLOCK), batch, height, width, WINDOW)
    query = tile * BLOCK + tl.arange(0, BLOCK)
    image, y, x, inside, region = place(query, index, height, width, WINDOW, SHIFT)
    q_rows = query_rows(q, q_strides, image, query, y, x, head, WINDOW, SHARED_QUERY)
    queries = load_tokens(q_rows, inside, D, BLOCK_D)
    most = tl.full([BLOCK], float('-inf'), ACC)
    total = tl.zeros([BLOCK], ACC)
    result = tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, N, BLOCK):
        key = start + tl.arange(0, BLOCK)
        _, ky, kx, kept, key_region = place(key, index, height, width, WINDOW, SHIFT)
        keys, values = load_keys(
            k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
            image, key, ky, kx, kept, head, WINDOW, D, BLOCK_D,
        )  # fmt: skip
        tile_bias = load_bias(bias, head, query[:, None], key[None, :], WINDOW, BLOCK)
        scores = masked_scores(queries, keys, tile_bias, region, key_region, SCALE, SHIFT)
        new_most = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - new_most[:, None])
        fade = tl.exp2(most - new_most)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None] + dot(p.to(values.dtype), values)
        most = new_most
    token = ((image * height + y) * width + x) * heads + head
    tl.store(lse + token, (most + tl.log2(total)) / LOG2E, mask=inside)
    store_tokens(out + token * D, result / total[:, None], inside, D, BLOCK_D)
