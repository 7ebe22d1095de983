"""Figures for every family: Grad-CAM, effective receptive fields, features as colors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..explain import enclosing_side, feature_pca
from .base import color_bar, heat, outline, panels, set_title, show

SHARE = 0.9  # share of the receptive field inside the frame


def plot_grad_cam(
    picture: np.ndarray,
    cams: Sequence[np.ndarray],
    input_size: tuple[int, int],
    target: str,
    model: str,
    box: np.ndarray | None = None,
) -> Figure:
    """Grad-CAM of a score, a panel for each output of the backbone.

    Args:
        picture: uint8 RGB (H, W, 3).
        cams: from :func:`mmattn.visualization.grad_cam`.
        input_size: rows and columns of the model's input, padding included.
        target: name of the score.
        model: name of the model.
        box: x1, y1, x2, y2 of the explained detection, in pixels.
    """
    figure, axes = panels(
        1,
        len(cams) + 1,
        picture.shape[:2],
        f'{model}: Grad-CAM for {target}',
        "Bright positions of a stage's features raise the score; each panel is scaled from 0 to "
        'its maximum. All dark: the score does not depend on this stage, or every position lowers '
        'it.',
    )
    show(axes[0, 0], picture, target)
    scale = Normalize(0, 1)
    for panel, cam in zip(axes[0, 1:], cams, strict=True):
        stride = _stride(cam, input_size)
        heat(panel, picture, cam / max(cam.max(), 1e-30), stride, scale, f'features at 1/{stride}')
    if box is not None:
        x1, y1, x2, y2 = box
        for panel in axes[0]:
            outline(panel, (y1, y2), (x1, x2))
    color_bar(figure, axes[0, -1], scale, 'share of the maximum')
    return figure


def plot_receptive_field(
    picture: np.ndarray, fields: Sequence[np.ndarray], strides: Sequence[int], model: str
) -> Figure:
    """Effective receptive field of the center of each output of the backbone, a panel for each.

    Args:
        picture: uint8 RGB (H, W, 3).
        fields: from :func:`mmattn.visualization.effective_receptive_field`.
        strides: pixels per token of each output.
        model: name of the model.
    """
    figure, axes = panels(
        1,
        len(fields),
        picture.shape[:2],
        f'{model}: effective receptive field of the center of each stage',
        'How strongly the features at the center depend on each pixel of this image (gradient), on '
        f'a logarithmic scale; the frame holds {SHARE:.0%} of the sum.',
        lines=2,
    )
    scale = LogNorm(1e-3, 1)
    for panel, field, stride in zip(axes[0], fields, strides, strict=True):
        side = enclosing_side(field, SHARE)
        # Average over the stem's patches: the gradient of single pixels varies with its stride.
        cell = 4
        rows, columns = (s // cell * cell for s in field.shape)
        coarse = field[:rows, :columns].reshape(rows // cell, cell, columns // cell, cell)
        coarse = coarse.mean((1, 3))
        coarse = np.maximum(coarse / coarse.max(), 1e-3)
        heat(
            panel,
            picture,
            coarse,
            cell,
            scale,
            f'features at 1/{stride}:\n{SHARE:.0%} within {side} × {side} px',
        )
        y, x = (_center(field.shape[axis], stride) for axis in (0, 1))
        outline(panel, (y - side / 2, y + side / 2), (x - side / 2, x + side / 2))
    color_bar(figure, axes[0, -1], scale, 'dependence, over its maximum')
    return figure


def plot_features(
    picture: np.ndarray, features: Sequence[Tensor], input_size: tuple[int, int], model: str
) -> Figure:
    """Principal components of the features as colors, a panel for each output of the backbone.

    Args:
        picture: uint8 RGB (H, W, 3).
        features: from a :class:`mmattn.visualization.Capture`.
        input_size: rows and columns of the model's input, padding included.
        model: name of the model.
    """
    figure, axes = panels(
        1,
        len(features) + 1,
        picture.shape[:2],
        f'{model}: features as colors',
        'The first three principal components of the channels as red, green and blue: positions of '
        'one color have similar features. Colors of different panels are not comparable.',
    )
    show(axes[0, 0], picture, 'image')
    height, width = picture.shape[:2]
    for panel, feature in zip(axes[0, 1:], features, strict=True):
        colors, variance = feature_pca(feature)
        rows, columns = colors.shape[:2]
        stride = _stride(colors, input_size)
        panel.imshow(
            colors, extent=(0, columns * stride, rows * stride, 0), interpolation='nearest'
        )
        panel.set(xlim=(0, width), ylim=(height, 0))
        set_title(
            panel,
            f'at 1/{stride}: {feature.shape[1]} channels,\n{variance.sum():.0%} of their variance',
        )
    return figure


def _stride(values: np.ndarray, input_size: tuple[int, int]) -> int:
    """Pixels per token of a map, rounded to a power of two."""
    return 2 ** round(float(np.log2(input_size[0] / values.shape[0])))


def _center(side: int, stride: int) -> float:
    return (-(-side // stride) // 2 + 0.5) * stride
