"""Neighborhood attention (NAT, arXiv 2204.07143), with its relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._backend import use_compiled
from ._checks import check_alike, check_device, check_shape
from ._operator import Operator, accumulate_dtype, result_dtype, without_autocast


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """Attention of each token to the kernel_size x kernel_size tokens nearest to it.

    Near the border the window is shifted inwards: it starts at
    ``clamp(i - kernel_size // 2, 0, n - kernel_size)`` along each axis.

    NATTEN has no relative position bias from release 0.21 on; the published DAT++ models need it.

    Args:
        q: queries, (B, H, W, heads, d), H and W at least kernel_size.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        rpb: bias table, (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), read at
            (y_k - y_q + kernel_size - 1, x_k - x_q + kernel_size - 1).
        kernel_size: odd height and width of the window in tokens; up to 21 in the CUDA kernels.
        scale: factor of the scores.

    Returns:
        (B, H, W, heads, d) in the dtype of ``v``. Scores, bias and sums are float32 (float64 for
        float64 inputs). The CUDA kernels take d up to 128.

    Raises:
        ValueError: a shape, dtype, device or the kernel does not fit the others.
    """
    _check(q, k, v, rpb, kernel_size)
    if not use_compiled('neighborhood_attention', q.device.type):
        return _attend(q, k, v, rpb, kernel_size, scale)
    rpb = rpb.to(accumulate_dtype(q.dtype))
    return torch.ops.mmattn.neighborhood_attention(q, k, v, rpb, kernel_size, scale)[0]


def neighborhood_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """PyTorch reference of :func:`neighborhood_attention`."""
    _check(q, k, v, rpb, kernel_size)
    return _attend(q, k, v, rpb, kernel_size, scale)


def neighborhood_attention_weights(
    q: Tensor, k: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """Attention weights of :func:`neighborhood_attention`, for inspection.

    Args:
        q, k, rpb, kernel_size, scale: as for :func:`neighborhood_attention`.

    Returns:
        (B, H, W, heads, kernel_size**2): each query's window of keys, row-major.
    """
    _check(q, k, k, rpb, kernel_size)
    rows, columns = (_neighbors(n, kernel_size, q.device) for n in q.shape[1:3])
    y, x = (
        index - torch.arange(index.shape[0], device=q.device)[:, None] + kernel_size - 1
        for index in (rows, columns)
    )
    rpb = rpb.to(accumulate_dtype(q.dtype))
    bias = rpb[:, y[:, None, :, None], x[None, :, None, :]].flatten(3, 4)  # (heads, H, W, k*k)
    scores = ((scale * q).unsqueeze(-2) @ _windows(k, kernel_size).transpose(-2, -1)).squeeze(-2)
    return (scores + bias.permute(1, 2, 0, 3)).softmax(dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float) -> Tensor:
    dtype = result_dtype(v)
    q, k, v = (t.to(accumulate_dtype(v.dtype)) for t in (q, k, v))
    with without_autocast(v):
        weights = neighborhood_attention_weights(q, k, rpb, kernel_size, scale)
        out = (weights.unsqueeze(-2) @ _windows(v, kernel_size)).squeeze(-2)
    return out.to(dtype)


def _windows(x: Tensor, kernel_size: int) -> Tensor:
    """(B, H, W, heads, d) -> the tokens around each one, (B, H, W, heads, k*k, d)."""
    rows, columns = (_neighbors(n, kernel_size, x.device) for n in x.shape[1:3])
    around = x[:, rows[:, None, :, None], columns[None, :, None, :]]
    return around.flatten(3, 4).transpose(3, 4)


def _neighbors(size: int, kernel_size: int, device: torch.device) -> Tensor:
    """(size, kernel_size): the indices that each index along an axis attends to."""
    index = torch.arange(size, device=device)
    start = (index - kernel_size // 2).clamp(0, size - kernel_size)
    return start[:, None] + torch.arange(kernel_size, device=device)


def _check(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        shapes = ', '.join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f'q, k and v must all be (B, H, W, heads, d), got {shapes}')
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
    if q.shape[4] < 1:
        raise ValueError(f'q must have at least one channel a head, got {tuple(q.shape)}')
    if any(n < kernel_size for n in q.shape[1:3]):
        raise ValueError(
            f'q must be at least kernel_size {kernel_size} high and wide, '
            f'got a map of {q.shape[1]} x {q.shape[2]}; pad it'
        )
    offsets = 2 * kernel_size - 1
    check_shape('rpb', rpb, 'heads N N', (q.shape[3], offsets, offsets))
    check_alike(q=q, k=k, v=v)
    check_device(q=q, rpb=rpb)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=accumulate_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _flops(
    q: torch.Size, k: torch.Size, v: torch.Size, rpb: torch.Size, kernel_size: int, scale: float
) -> int:
    return 2 * 2 * math.prod(q) * kernel_size**2  # two products


Operator(
    'neighborhood_attention',
    'Tensor q, Tensor k, Tensor v, Tensor rpb, int kernel_size, float scale',
    outputs=['out', 'lse'],
    fake=_fake,
    gradients=['q', 'k', 'v', 'rpb'],
    low_precision=['q', 'k', 'v'],
    flops=_flops,
)
