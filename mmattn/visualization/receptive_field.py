"""Effective receptive fields (arXiv 1701.04128): which pixels the middle of an output depends on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .capture import find_backbone, frozen


def effective_receptive_field(model: nn.Module, inputs: Tensor) -> list[np.ndarray]:
    """How much the middle of each output of the backbone depends on each pixel of the image.

    The absolute gradient by the pixels, summed over colours, of a random mixture of the channels there: their plain
    sum is constant behind a LayerNorm.

    Args:
        model: a backbone of ours, or a model with one inside.
        inputs: normalised images (B, 3, H, W); the result is the mean over them.

    Returns:
        For each output float32 (H, W), which sums to 1.
    """
    backbone = find_backbone(model)
    inputs = inputs.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    fields = []
    with frozen(backbone), torch.enable_grad():
        for output in backbone(inputs):
            middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
            mixture = torch.randn(middle.shape, generator=generator).to(middle)
            (gradient,) = torch.autograd.grad(middle, inputs, mixture, retain_graph=True)
            field = gradient.abs().sum((0, 1))
            fields.append((field / field.sum().clamp(min=1e-30)).float().cpu().numpy())
    return fields


def side_that_holds(field: np.ndarray, share: float) -> int:
    """Side in pixels of the smallest square around a field's centre of mass that holds this share of it."""
    total = field.sum()
    y, x = (
        round(float((field.sum(1 - axis) * np.arange(field.shape[axis])).sum() / total))
        for axis in (0, 1)
    )
    for radius in range(max(field.shape)):
        square = field[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        if square.sum() >= share * total:
            return 2 * radius + 1
    return 2 * max(field.shape) + 1
