"""Fitting position tables to other windows."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def resize_bias_table(table: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A relative position bias table for another window, bicubically as an image of each head.

    Args:
        table: ((2w-1)**2, heads).
        shape: ((2v-1)**2, heads), the shape wanted.

    Returns:
        The table of that shape, or None where the two are not tables of the same heads.
    """
    sides = [math.isqrt(rows) for rows in (table.shape[0], shape[0])]
    if (
        table.ndim != 2
        or table.shape[1] != shape[1]
        or sides[0] ** 2 != table.shape[0]
        or sides[1] ** 2 != shape[0]
    ):
        return None
    image = table.t().reshape(1, -1, sides[0], sides[0])
    wanted = F.interpolate(
        image.float() if table.itemsize < 4 else image, size=(sides[1], sides[1]), mode='bicubic'
    )
    return wanted.view(-1, shape[0]).t().to(table.dtype)


def resize_displacement_table(table: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A deformable attention's position table for another image size.

    The module reads it bilinearly from corner to corner (displacements from -2 to 2, whatever the map), and so it
    is read here.

    Args:
        table: (heads, 2s-1, 2s-1).
        shape: (heads, 2t-1, 2t-1), the shape wanted.

    Returns:
        The table of that shape, or None where the two are not tables of the same heads.
    """
    if table.ndim != 3 or len(shape) != 3 or table.shape[0] != shape[0]:
        return None
    image = table[None].float() if table.itemsize < 4 else table[None]
    wanted = F.interpolate(image, size=shape[1:], mode='bilinear', align_corners=True)
    return wanted[0].to(table.dtype)
