"""Neighbourhood attention (NAT, arXiv 2204.07143), with its relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._backend import compiled_serves
from ._operator import accumulate_dtype, check_alike, check_device, register


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """Each token attends to the kernel_size x kernel_size tokens nearest to it.

    Near the border the window is shifted inwards: it starts at
    ``clamp(i - kernel_size // 2, 0, n - kernel_size)`` along each axis.

    NATTEN, from release 0.21 on, has no relative position bias, which the published DAT++ models were
    trained with: this operator is the only way to serve them.

    Args:
        q: queries, (B, H, W, heads, d), H and W at least kernel_size.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        rpb: bias table, (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), read at
            (y_k - y_q + kernel_size - 1, x_k - x_q + kernel_size - 1).
        kernel_size: odd side of the window in tokens. The CUDA kernels take up to 21.
        scale: of the scores.

    Returns:
        (B, H, W, heads, d) in the dtype of ``v``. Scores, bias and sums are float32 (float64 for float64
        inputs). The CUDA kernels take d up to 128.

    Raises:
        ValueError: a shape, dtype, device or the kernel does not fit the others.
    """
    _check(q, k, v, rpb, kernel_size)
    rpb = rpb.to(accumulate_dtype(q.dtype))
    if not compiled_serves('neighborhood_attention', q.device.type):
        return _attend(q, k, v, rpb, kernel_size, scale)
    return torch.ops.mmattn.neighborhood_attention(q, k, v, rpb, kernel_size, scale)[0]


def neighborhood_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """The literal definition of :func:`neighborhood_attention`, which the kernels are held against."""
    _check(q, k, v, rpb, kernel_size)
    return _attend(q, k, v, rpb.to(accumulate_dtype(q.dtype)), kernel_size, scale)


def neighborhood_attention_weights(
    q: Tensor, k: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """What :func:`neighborhood_attention` multiplies its values with, for people to see.

    Args:
        q, k, rpb, kernel_size, scale: as there.

    Returns:
        (B, H, W, heads, kernel_size**2): each query's window of keys, row-major.
    """
    _check(q, k, k, rpb, kernel_size)
    return _weights(q, k, rpb.to(accumulate_dtype(q.dtype)), kernel_size, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float) -> Tensor:
    weights = _weights(q, k, rpb, kernel_size, scale)
    return (weights.unsqueeze(-2).to(v.dtype) @ _windows(v, kernel_size)).squeeze(-2)


def _windows(x: Tensor, kernel_size: int) -> Tensor:
    """(B, H, W, heads, d) -> the tokens around each one, (B, H, W, heads, k*k, d)."""
    rows, columns = (_neighbours(side, kernel_size, x.device) for side in x.shape[1:3])
    around = x[:, rows[:, None, :, None], columns[None, :, None, :]]
    return around.flatten(3, 4).transpose(3, 4)


def _weights(q: Tensor, k: Tensor, rpb: Tensor, kernel_size: int, scale: float) -> Tensor:
    rows, columns = (
        _neighbours(side, kernel_size, q.device) for side in q.shape[1:3]
    )  # (n, kernel)
    y, x = (
        index - torch.arange(index.shape[0], device=q.device)[:, None] + kernel_size - 1
        for index in (rows, columns)
    )
    bias = rpb[:, y[:, None, :, None], x[None, :, None, :]].flatten(3, 4)  # (heads, H, W, k*k)

    scores = ((scale * q).unsqueeze(-2) @ _windows(k, kernel_size).transpose(-2, -1)).squeeze(-2)
    return (scores + bias.permute(1, 2, 0, 3)).softmax(dim=-1)


def _neighbours(side: int, kernel_size: int, device: torch.device) -> Tensor:
    """(side, kernel_size): the indices that each place along an axis attends to."""
    place = torch.arange(side, device=device)
    start = (place - kernel_size // 2).clamp(0, side - kernel_size)
    return start[:, None] + torch.arange(kernel_size, device=device)


def _check(q, k, v, rpb, kernel_size):
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        shapes = ', '.join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f'q, k and v must all be (B, H, W, heads, d), got {shapes}')
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
    if q.shape[4] < 1:
        raise ValueError(f'heads must have at least one channel, got {tuple(q.shape)}')
    if any(side < kernel_size for side in q.shape[1:3]):
        raise ValueError(
            f'a map of {q.shape[1]} x {q.shape[2]} is smaller than kernel_size {kernel_size}; pad it'
        )
    expected = (q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1)
    if tuple(rpb.shape) != expected:
        raise ValueError(f'rpb must be {expected}, got {tuple(rpb.shape)}')
    check_alike(q=q, k=k, v=v)
    check_device(q=q, rpb=rpb)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=accumulate_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _flops(q, k, v, rpb, kernel_size, scale) -> int:
    *tokens, depth = q
    return (
        2 * 2 * math.prod(tokens) * kernel_size**2 * depth
    )  # queries with keys, scores with values


register(
    'neighborhood_attention',
    'Tensor q, Tensor k, Tensor v, Tensor rpb, int kernel_size, float scale',
    outputs=['out', 'lse'],
    fake=_fake,
    gradients=['q', 'k', 'v', 'rpb'],
    low_precision=['q', 'k', 'v'],
    flops=_flops,
)
