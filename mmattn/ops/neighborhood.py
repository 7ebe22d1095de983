"""Neighbourhood attention (NAT, arXiv 2204.07143), with its relative position bias."""

from __future__ import annotations

import torch
from torch import Tensor


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, scale: float
) -> Tensor:
    """Each token attends to the kernel_size x kernel_size tokens nearest to it.

    Near the border the window is shifted inwards: it starts at
    ``clamp(i - kernel_size // 2, 0, n - kernel_size)`` along each axis.

    Args:
        q: queries, (B, H, W, heads, d), H and W at least kernel_size.
        k: keys, (B, H, W, heads, d).
        v: values, (B, H, W, heads, d).
        rpb: bias table, (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), read at
            (y_k - y_q + kernel_size - 1, x_k - x_q + kernel_size - 1).
        kernel_size: odd side of the window in tokens.
        scale: of the scores.

    Returns:
        (B, H, W, heads, d) in the dtype of ``v``.

    Raises:
        ValueError: a shape or the kernel does not fit the others.
    """
    _check(q, k, v, rpb, kernel_size)
    rows, columns = (
        _neighbours(side, kernel_size, q.device) for side in q.shape[1:3]
    )  # (n, kernel)
    window = (slice(None), rows[:, None, :, None], columns[None, :, None, :])
    keys, values = (
        t[window].flatten(3, 4).transpose(3, 4) for t in (k, v)
    )  # (B, H, W, heads, k*k, d)

    y = rows - torch.arange(len(rows), device=q.device)[:, None] + kernel_size - 1
    x = columns - torch.arange(len(columns), device=q.device)[:, None] + kernel_size - 1
    bias = rpb[:, y[:, None, :, None], x[None, :, None, :]].flatten(3, 4)  # (heads, H, W, k*k)

    scores = (scale * q).unsqueeze(-2) @ keys.transpose(-2, -1) + bias.permute(
        1, 2, 0, 3
    ).unsqueeze(-2)
    return (scores.softmax(dim=-1).to(v.dtype) @ values).squeeze(-2)


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
    if min(q.shape[1:3]) < kernel_size:
        raise ValueError(
            f'a map of {q.shape[1]} x {q.shape[2]} is smaller than kernel_size {kernel_size}; pad it'
        )
    expected = (q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1)
    if tuple(rpb.shape) != expected:
        raise ValueError(f'rpb must be {expected}, got {tuple(rpb.shape)}')
