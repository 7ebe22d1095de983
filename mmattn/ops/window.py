"""Window attention, local (Swin, arXiv 2103.14030) or with a shared query (GC ViT, 2206.09959)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import known_equal, use_compiled
from ._checks import check_alike, check_device, check_shape
from ._operator import Operator, accumulate_dtype, result_dtype, without_autocast

# Swin and DAT add it to the scores of two tokens that the cyclic shift brought into one window.
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

    The map is padded at the right and at the bottom to a multiple of the window. The padding takes
    part in attention as keys ``pad_k`` with values ``pad_v`` and is cropped from the result.

    Args:
        q: queries, (B, H, W, heads, d); or (B, window_size, window_size, heads, d): one window of
            queries per image that all its windows share.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        bias: added to the scores, (heads, N, N) for the N = window_size**2 tokens of a window in
            row-major order, query first.
        window_size: height and width of a window in tokens.
        shift: windows start ``shift`` tokens further down and right; pairs of tokens that then come
            from opposite borders of the map are masked with -100, as in Swin.
        pad_k: key of the padding, (heads, d); zero by default.
        pad_v: value of the padding, (heads, d); zero by default.

    Returns:
        (B, H, W, heads, d) in the dtype of ``v``.

    Raises:
        ValueError: a shape, dtype or device, the window or the shift does not fit the others.
    """
    _check(q, k, v, bias, window_size, shift, pad_k, pad_v)
    if not use_compiled('window_attention', k.device.type):
        return _attend(q, k, v, bias, window_size, shift, pad_k, pad_v)
    heads, d = k.shape[3:]
    pad_k, pad_v = (k.new_zeros(heads, d) if t is None else t.to(k.dtype) for t in (pad_k, pad_v))
    bias = bias.to(accumulate_dtype(k.dtype))
    return torch.ops.mmattn.window_attention(q, k, v, bias, pad_k, pad_v, window_size, shift)[0]


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
    """PyTorch reference of :func:`window_attention`."""
    _check(q, k, v, bias, window_size, shift, pad_k, pad_v)
    return _attend(q, k, v, bias, window_size, shift, pad_k, pad_v)


def window_attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int = 0,
    pad_k: Tensor | None = None,
) -> Tensor:
    """Attention weights of :func:`window_attention`, for inspection.

    Args:
        q, k, bias, window_size, shift, pad_k: as for :func:`window_attention`.

    Returns:
        ``softmax(q k^T / sqrt(d) + bias)``, (B, windows, heads, N, N), query first; windows and
        their tokens are row-major and include the padding.
    """
    _check(q, k, k, bias, window_size, shift, pad_k, None)
    q = _query_windows(q, k, window_size, shift)
    k = _lay_out(k, window_size, shift, pad_k)
    if shift:
        bias = bias + _shift_mask(k.shape[1], k.shape[2], window_size, shift, bias)
    scores = (q * q.shape[-1] ** -0.5) @ _partition(k, window_size).transpose(-2, -1)
    return (scores + bias).softmax(dim=-1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
) -> Tensor:
    height, width = k.shape[1:3]
    dtype = result_dtype(v)
    q, k, v, bias = (t.to(accumulate_dtype(v.dtype)) for t in (q, k, v, bias))
    with without_autocast(v):
        weights = window_attention_weights(q, k, bias, window_size, shift, pad_k)
        v = _lay_out(v, window_size, shift, pad_v)
        out = _join(weights @ _partition(v, window_size), v.shape[1], v.shape[2], window_size)
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out.narrow(1, 0, height).narrow(2, 0, width).to(dtype)


def _has_own_queries(q: Tensor, k: Tensor) -> bool:
    """True if each token has a query; the same for a map of one window, shared or not."""
    if torch.jit.is_tracing():  # sizes are tensors
        return tuple(map(int, q.shape[1:3])) == tuple(map(int, k.shape[1:3]))
    return known_equal(q.shape[1], k.shape[1]) and known_equal(q.shape[2], k.shape[2])


def _query_windows(q: Tensor, k: Tensor, window_size: int, shift: int) -> Tensor:
    """(B, windows, heads, N, d); for a shared query (B, 1, heads, N, d), one for all windows."""
    if _has_own_queries(q, k):
        return _partition(_lay_out(q, window_size, shift, None), window_size)
    return q.flatten(1, 2).transpose(1, 2).unsqueeze(1)


def _lay_out(x: Tensor, window_size: int, shift: int, padding: Tensor | None) -> Tensor:
    """(B, H, W, heads, d) -> the same, padded to whole windows and shifted."""
    height, width = x.shape[1:3]
    bottom, right = (((n - 1) // window_size + 1) * window_size - n for n in (height, width))
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
    if padding is not None:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[1:3])
        outside = (rows >= height)[:, None] | (columns >= width)
        x = torch.where(outside[..., None, None], padding.to(x.dtype), x)
    return x.roll((-shift, -shift), dims=(1, 2)) if shift else x


def _partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, heads, d) -> (B, windows, heads, N, d)."""
    batch, height, width, heads, d = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.reshape(batch, rows, window_size, columns, window_size, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _join(x: Tensor, height: int, width: int, window_size: int) -> Tensor:
    """(B, windows, heads, N, d) -> (B, H, W, heads, d)."""
    batch, _, heads, _, d = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.view(batch, rows, columns, heads, window_size, window_size, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, d)


def _shift_mask(height: int, width: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """(windows, 1, N, N): -100 for tokens of a window from different regions of the map, else 0."""
    rows, columns = (_region(n, window_size, shift, like.device) for n in (height, width))
    region = 3 * rows[:, None] + columns
    region = _partition(region[None, :, :, None, None], window_size).flatten(1)
    region = region.view(-1, 1, window_size**2)
    different = region.unsqueeze(-1) != region.unsqueeze(-2)
    return different.to(like.dtype) * _SHIFT_MASK


def _region(size: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    """(size,): 0 in whole windows, 1 and 2 in the parts that the shift joins in the last one."""
    index = torch.arange(size, device=device)
    return (index >= size - window_size).long() + (index >= size - shift).long()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window_size: int,
    shift: int,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
) -> None:
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
        raise ValueError(f'shift must be 0 for a shared query, got {shift} with q {tuple(q.shape)}')
    check_shape('bias', bias, 'heads N N', (heads, window_size**2, window_size**2))
    for name, padding in (('pad_k', pad_k), ('pad_v', pad_v)):
        if padding is not None:
            check_shape(name, padding, 'heads d', (heads, d))
    check_alike(q=q, k=k, v=v)
    check_device(q=q, bias=bias, pad_k=pad_k, pad_v=pad_v)
    if d < 1:
        raise ValueError(f'k must have at least one channel a head, got {tuple(k.shape)}')


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_k: Tensor,
    pad_v: Tensor,
    window_size: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    lse = v.new_empty(v.shape[:-1], dtype=accumulate_dtype(v.dtype))
    return v.new_empty(v.shape), lse


def _flops(
    q: torch.Size, k: torch.Size, v: torch.Size, bias: torch.Size, *others: torch.Size | int
) -> int:
    batch, height, width, heads, d = k
    tokens = bias[1]
    window_size = round(tokens**0.5)
    queries = -(-height // window_size) * -(-width // window_size) * tokens  # with the padding
    return 2 * 2 * batch * heads * queries * tokens * d  # two products


Operator(
    'window_attention',
    'Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_k, Tensor pad_v, '
    'int window_size, int shift',
    outputs=['out', 'lse'],
    fake=_fake,
    gradients=['q', 'k', 'v', 'bias', 'pad_k', 'pad_v'],
    low_precision=['q', 'k', 'v', 'pad_k', 'pad_v'],
    flops=_flops,
)
