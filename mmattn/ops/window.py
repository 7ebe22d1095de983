"""Window attention over a map: Swin's windows (arXiv 2103.14030), GC ViT's shared query (arXiv 2206.09959)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import compiled_serves, known_equal, literal_is_asked_for
from ._operator import accumulate_dtype, check_alike, check_device, register

# From this many tokens a window on, scaled_dot_product_attention is the faster: 24 x 24 tokens take 0.30 ms
# instead of 0.99 and a third of the memory on an H200; 7 x 7 and 14 x 14 are no faster, on GPU or CPU.
_FUSED_FROM_TOKENS = 256

# What Swin and DAT add to the scores of two tokens that the cyclic shift brought into one window.
_SHIFT_MASK = -100.0


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int = 0,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
) -> Tensor:
    """Softmax attention within the windows of a map: ``softmax(q k^T / sqrt(d) + bias) v``.

    The map is extended at the right and at the bottom to a multiple of the window. What is added takes part
    in attention as keys ``pad_k`` with values ``pad_v`` and is cropped from the result.

    Args:
        q: queries, (B, H, W, heads, d): every token's own; or (B, window_size, window_size, heads, d): one
            window of queries per image that all its windows share.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        bias: added to the scores, (heads, N, N) for the N = window_size**2 tokens of a window in row-major
            order, query first.
        window_size: side of a window in tokens.
        shift: windows start ``shift`` tokens further down and right; what they then hold from opposite
            borders of the map is masked with -100, as in Swin.
        pad_k: key of the padding, (heads, d); zero without it.
        pad_v: value of the padding, (heads, d); zero without it.

    Returns:
        (B, H, W, heads, d) in the dtype of ``v``.

    Raises:
        ValueError: a shape, dtype or device, the window or the shift does not fit the others.
    """
    _check(q, k, v, bias, window_size, shift, pad_k, pad_v)
    if compiled_serves('window_attention', k.device.type):
        heads, d = k.shape[3:]
        pad_k, pad_v = (
            k.new_zeros(heads, d) if t is None else t.to(k.dtype) for t in (pad_k, pad_v)
        )
        bias = bias.to(accumulate_dtype(k.dtype))
        return torch.ops.mmattn.window_attention(q, k, v, bias, pad_k, pad_v, window_size, shift)[0]
    large = window_size**2 >= _FUSED_FROM_TOKENS
    attend = _fused if large and not literal_is_asked_for() else _literal
    return _in_windows(attend, q, k, v, bias, window_size, shift, pad_k, pad_v)


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int = 0,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
) -> Tensor:
    """The literal definition of :func:`window_attention`, which every faster way is held against."""
    _check(q, k, v, bias, window_size, shift, pad_k, pad_v)
    return _in_windows(_literal, q, k, v, bias, window_size, shift, pad_k, pad_v)


def window_attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int = 0,
    pad_k: Tensor | None = None,
) -> Tensor:
    """What :func:`window_attention` multiplies its values with, ``softmax(q k^T / sqrt(d) + bias)``, for people to see.

    Args:
        q, k, bias, window_size, shift, pad_k: as there.

    Returns:
        (B, windows, heads, N, N), query first; windows and their tokens are row-major and hold the padding.
    """
    _check(q, k, k, bias, window_size, shift, pad_k, None)
    q = _query_windows(q, k, window_size, shift)
    k = _lay_out(k, window_size, shift, pad_k)
    if shift:
        bias = bias + _shift_mask(*k.shape[1:3], window_size, shift, bias)
    return _weights(q, _partition(k, window_size), bias)


def window_attention_flops(
    height: int, width: int, channels: int, window_size: int, shared_query: bool
) -> int:
    """Multiply-adds of a window attention module, projections included, on a map that its windows tile.

    Local: ``2HW(2C^2 + hwC)``; global, whose query is made elsewhere: ``HW(3C^2 + 2hwC)`` (GC ViT, section 3.3).
    """
    projections = (3 if shared_query else 4) * channels**2
    return height * width * (projections + 2 * window_size**2 * channels)


def _literal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return _weights(q, k, bias).to(v.dtype) @ v


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(dim=-1)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    *batch, heads, n, _ = k.shape
    bias = bias.expand(*batch, heads, n, n).flatten(0, 1)  # the fused kernels take four dimensions
    flat = [t.expand_as(k).flatten(0, 1) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*flat, attn_mask=bias.to(q.dtype)).view_as(v)


def _in_windows(attend, q, k, v, bias, window_size, shift, pad_k, pad_v):
    _, height, width, _, _ = k.shape
    q = _query_windows(q, k, window_size, shift)
    k = _lay_out(k, window_size, shift, pad_k)
    v = _lay_out(v, window_size, shift, pad_v)
    padded = k.shape[1:3]
    if shift:
        bias = bias + _shift_mask(*padded, window_size, shift, bias)
    out = attend(q, _partition(k, window_size), _partition(v, window_size), bias)
    out = _join(out, *padded, window_size)
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out.narrow(1, 0, height).narrow(2, 0, width)


def _has_own_queries(q: Tensor, k: Tensor) -> bool:
    """Whether every token has a query; a map of exactly one window may be taken either way."""
    return known_equal(q.shape[1], k.shape[1]) and known_equal(q.shape[2], k.shape[2])


def _query_windows(q: Tensor, k: Tensor, window_size: int, shift: int) -> Tensor:
    """(B, windows, heads, N, d), or of a shared query (B, 1, heads, N, d): one for all windows."""
    if _has_own_queries(q, k):
        return _partition(_lay_out(q, window_size, shift, None), window_size)
    return q.flatten(1, 2).transpose(1, 2).unsqueeze(1)


def _lay_out(x: Tensor, window_size: int, shift: int, padding: Tensor | None) -> Tensor:
    """(B, H, W, heads, d) -> the same, padded to whole windows and shifted."""
    height, width = x.shape[1:3]
    bottom, right = (
        ((side - 1) // window_size + 1) * window_size - side for side in (height, width)
    )
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
    if padding is not None:
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[1:3])
        outside = (rows >= height)[:, None] | (columns >= width)
        x = torch.where(outside[..., None, None], padding.to(x.dtype), x)
    return x.roll((-shift, -shift), dims=(1, 2)) if shift else x


def _partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, heads, d) -> (B, windows, heads, N, d)."""
    batch, height, width, heads, d = x.shape
    x = x.reshape(
        batch, height // window_size, window_size, width // window_size, window_size, heads, d
    )
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _join(x: Tensor, height: int, width: int, window_size: int) -> Tensor:
    """(B, windows, heads, N, d) -> (B, H, W, heads, d)."""
    batch, _, heads, _, d = x.shape
    x = x.view(
        batch, height // window_size, width // window_size, heads, window_size, window_size, d
    )
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, d)


def _shift_mask(height: int, width: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """(windows, 1, N, N): -100 between tokens of one window that are no neighbours in the map, else 0."""
    rows, columns = (_region(side, window_size, shift, like.device) for side in (height, width))
    region = 3 * rows[:, None] + columns
    region = _partition(region[None, :, :, None, None], window_size).flatten(1)
    region = region.view(-1, 1, window_size**2)
    different = region.unsqueeze(-1) != region.unsqueeze(-2)
    return different.to(like.dtype) * _SHIFT_MASK


def _region(side: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    """(side,): 0 for whole windows, 1 and 2 for the two parts of the last one, which the shift has joined."""
    place = torch.arange(side, device=device)
    return (place >= side - window_size).long() + (place >= side - shift).long()


def _check(q, k, v, bias, window_size, shift, pad_k, pad_v):
    if k.ndim != 5 or v.shape != k.shape:
        raise ValueError(
            f'k and v must both be (B, H, W, heads, d), got {tuple(k.shape)} and {tuple(v.shape)}'
        )
    batch, height, width, heads, d = k.shape
    own, shared = (batch, height, width, heads, d), (batch, window_size, window_size, heads, d)
    if tuple(q.shape) != (own if _has_own_queries(q, k) else shared):
        raise ValueError(f'q must be {own}, or {shared} for a shared query, got {tuple(q.shape)}')
    if not 0 <= shift < window_size:
        raise ValueError(
            f'shift must be in [0, window_size), got {shift} with window_size {window_size}'
        )
    if shift and not _has_own_queries(q, k):
        raise ValueError(
            f'a shared query has no place in shifted windows: got shift {shift} with q {tuple(q.shape)}'
        )
    if tuple(bias.shape) != (heads, window_size**2, window_size**2):
        expected = (heads, window_size**2, window_size**2)
        raise ValueError(f'bias must be (heads, N, N) = {expected}, got {tuple(bias.shape)}')
    for name, padding in (('pad_k', pad_k), ('pad_v', pad_v)):
        if padding is not None and tuple(padding.shape) != (heads, d):
            raise ValueError(
                f'{name} must be (heads, d) = {(heads, d)}, got {tuple(padding.shape)}'
            )
    check_alike(q=q, k=k, v=v)
    check_device(q=q, bias=bias, pad_k=pad_k, pad_v=pad_v)
    if d < 1:
        raise ValueError(f'heads must have at least one channel, got k {tuple(k.shape)}')


def _fake(q, k, v, bias, pad_k, pad_v, window_size, shift):
    out = v.new_empty(v.shape)
    return out, v.new_empty(v.shape[:-1], dtype=accumulate_dtype(v.dtype))


def _flops(q, k, v, bias, *others):
    batch, height, width, heads, d = k
    tokens = bias[1]
    side = round(tokens**0.5)
    queries = -(-height // side) * -(-width // side) * tokens  # with the padding
    return 2 * 2 * batch * heads * queries * tokens * d  # two products


register(
    'window_attention',
    'Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_k, Tensor pad_v, int window_size, int shift',
    outputs=['out', 'lse'],
    fake=_fake,
    gradients=['q', 'k', 'v', 'bias', 'pad_k', 'pad_v'],
    low_precision=['q', 'k', 'v', 'pad_k', 'pad_v'],
    flops=_flops,
)
