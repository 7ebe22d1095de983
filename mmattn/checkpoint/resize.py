"""Tensors fitted to other windows, image sizes and input channels."""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from torch import Tensor


def resize_bias_table(table: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Relative position bias table for another window, interpolated bicubically for each head.

    Args:
        table: ((2w-1)**2, heads).
        shape: ((2v-1)**2, heads), the shape wanted.

    Returns:
        The table of that shape, or None where the two are not tables of the same heads.
    """
    if table.ndim != 2 or len(shape) != 2 or table.shape[1] != shape[1]:
        return None
    sides = [math.isqrt(rows) for rows in (table.shape[0], shape[0])]
    if sides[0] ** 2 != table.shape[0] or sides[1] ** 2 != shape[0]:
        return None
    image = table.t().reshape(-1, sides[0], sides[0])
    return _resize_image(image, (sides[1], sides[1])).view(-1, shape[0]).t()


def resize_displacement_table(table: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Table of displacements for another image size, interpolated bicubically for each head.

    So DAT's authors start to fine-tune at 384. Attention aligns the table's corners, so that the
    bias it reads changes slightly.

    Args:
        table: (heads, 2s-1, 2s-1).
        shape: (heads, 2t-1, 2t-1), the shape wanted.

    Returns:
        The table of that shape, or None where the two are not tables of the same heads.
    """
    if table.ndim != 3 or len(shape) != 3 or table.shape[0] != shape[0]:
        return None
    return _resize_image(table, (shape[1], shape[2]))


def _resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(heads, h, w) in another size, bicubically, corners not aligned; half types by float32."""
    wider = image.float() if image.itemsize < 4 else image
    return F.interpolate(wider[None], size=size, mode='bicubic')[0].to(image.dtype)


def resize_input_channels(kernel: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Kernel of a first convolution for images with another number of channels.

    Of one channel, the kernel is the sum over the colors (a gray image then gives what three equal
    channels gave); of more, the colors are repeated in turn and scaled to keep the sum.

    Args:
        kernel: (out, c, h, w).
        shape: (out, c', h, w), the shape wanted.

    Returns:
        The kernel of that shape, or None where more than the channels differs.
    """
    same = kernel.ndim == len(shape) == 4 and kernel.shape[2:] == shape[2:]
    if not same or kernel.shape[0] != shape[0]:
        return None
    channels, wanted = kernel.shape[1], shape[1]
    if wanted == 1:
        return kernel.sum(1, keepdim=True)
    repeated = kernel.repeat(1, -(-wanted // channels), 1, 1)[:, :wanted]
    return repeated * (channels / wanted)


# By a pattern of our names, what fits a tensor to another size.
_RESIZES = {
    r'.*\.relative_position_bias_table': resize_bias_table,
    r'.*\.position_bias\.table': resize_displacement_table,
    r'stem\.(0\.)?(conv|proj)\.weight': resize_input_channels,
}


def resize(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A backbone's tensor in the shape that a model wants, or None if it cannot be resized.

    Args:
        name: our name of it, from the backbone on.
        value: the tensor.
        shape: the shape wanted.
    """
    for pattern, function in _RESIZES.items():
        if re.fullmatch(pattern, name):
            return function(value, shape)
    return None
