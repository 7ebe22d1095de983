"""Pictures for every family: Grad-CAM, effective receptive fields, features as colors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..pca import feature_pca
from ..receptive_field import side_that_holds
from .base import color_bar, set_title, heat, outline, panels, show

SHARE = 0.9  # of the receptive field, in the frame


def plot_grad_cam(
    picture: np.ndarray,
    cams: Sequence[np.ndarray],
    input_size: tuple[int, int],
    target: str,
    model: str,
    box: np.ndarray | None = None,
) -> Figure:
    """Places that raise a score, a panel for each output of the backbone.

    Args:
        picture: uint8 RGB (H, W, 3).
        cams: of :func:`mmattn.visualization.grad_cam`.
        input_size: rows and columns of the model's input, padding included.
        target: what the score is.
        model: name of the model.
        box: x1, y1, x2, y2 of the detection that is explained.
    """
    figure, axes = panels(
        1,
        len(cams) + 1,
        picture.shape[:2],
        f'{model}: Grad-CAM for {target}',
        "Bright places of a stage's features raise the score; each panel goes from 0 to its own maximum. Dark "
        'throughout: the score does not depend on this stage, or only places that lower it.',
    )
    show(axes[0, 0], picture, target)
    scale = Normalize(0, 1)
    for panel, cam in zip(axes[0, 1:], cams, strict=True):
        stride = _stride(cam, input_size)
        heat(panel, picture, cam / max(cam.max(), 1e-30), stride, scale, f'features at 1/{stride}')
    if box is not None:
        for panel in axes[0]:
            outline(panel, box[1::2], box[::2])
    color_bar(figure, axes[0, -1], scale, 'share of the maximum')
    return figure


def plot_receptive_field(
    picture: np.ndarray, fields: Sequence[np.ndarray], strides: Sequence[int], model: str
) -> Figure:
    """What the middle of each output of the backbone depends on, a panel for each.

    Args:
        picture: uint8 RGB (H, W, 3).
        fields: of :func:`mmattn.visualization.effective_receptive_field`.
        strides: pixels a token of each output.
        model: name of the model.
    """
    figure, axes = panels(
        1,
        len(fields),
        picture.shape[:2],
        f'{model}: effective receptive field of the middle of each stage',
        'How strongly the features in the middle depend on each pixel of this image (gradient), on a logarithmic '
        f'scale; the frame holds {SHARE:.0%} of it.',
        lines=2,
    )
    scale = LogNorm(1e-3, 1)
    for panel, field, stride in zip(axes[0], fields, strides, strict=True):
        side = side_that_holds(field, SHARE)
        # Pixels of a token together: single ones flicker with the stem's stride.
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
        y, x = (_middle(field.shape[axis], stride) for axis in (0, 1))
        outline(panel, (y - side / 2, y + side / 2), (x - side / 2, x + side / 2))
    color_bar(figure, axes[0, -1], scale, 'dependence, over its maximum')
    return figure


def plot_features(
    picture: np.ndarray, features: Sequence[Tensor], input_size: tuple[int, int], model: str
) -> Figure:
    """The features as colors, a panel for each output of the backbone.

    Args:
        picture: uint8 RGB (H, W, 3).
        features: of a :class:`mmattn.visualization.Capture`.
        input_size: rows and columns of the model's input, padding included.
        model: name of the model.
    """
    figure, axes = panels(
        1,
        len(features) + 1,
        picture.shape[:2],
        f'{model}: features as colors',
        'The three strongest principal components of the channels as red, green and blue: places of one color look '
        'alike to the model. Colors of different panels have nothing to do with each other.',
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
    """Pixels a token of a map: a power of two."""
    return 2 ** round(float(np.log2(input_size[0] / values.shape[0])))


def _middle(side: int, stride: int) -> float:
    return (-(-side // stride) // 2 + 0.5) * stride
