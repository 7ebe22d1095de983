"""Swin's relative position bias (arXiv 2103.14030, section 3.2)."""

import torch
from torch import Tensor


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window.

    Args:
        window_size: side w of the window in tokens.

    Returns:
        int64 (N, N), N = w**2 in row-major order, query first:
        ``(y_q - y_k + w - 1) * (2w - 1) + (x_q - x_k + w - 1)``.
    """
    side = torch.arange(window_size)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing='ij'))
    rows = y[:, None] - y + window_size - 1
    columns = x[:, None] - x + window_size - 1
    return rows * (2 * window_size - 1) + columns


def relative_position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each head for each pair of tokens.

    Args:
        table: ((2w-1)**2, heads).
        index: (N, N), of :func:`relative_position_index`.

    Returns:
        (heads, N, N), contiguous.
    """
    return table.t().index_select(1, index.flatten()).view(-1, *index.shape)
