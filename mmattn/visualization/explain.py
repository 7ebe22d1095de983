"""Grad-CAM, effective receptive fields and principal components of a backbone's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from .capture import find_backbone, frozen

if TYPE_CHECKING:
    from .subject import Subject, View


def grad_cam(
    model: nn.Module, inputs: Tensor, score: Callable[[Tensor], Tensor]
) -> list[np.ndarray]:
    """Grad-CAM (arXiv 1610.02391) of a score on each feature map, computed by captum.

    Args:
        model: a backbone of mmattn, or a model that contains one.
        inputs: normalized images (1, 3, H, W).
        score: maps ``inputs`` to the score to explain, (1,), by a forward pass of ``model``.

    Returns:
        A float32 (H_i, W_i) >= 0 for each output of the backbone; all zero where the score does
        not depend on it.

    Raises:
        ModuleNotFoundError: captum is not installed.
    """
    try:
        from captum.attr import LayerGradCam
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Grad-CAM is computed by captum, which is not installed: pip install --no-deps captum'
        ) from error
    # A head need not use all maps (RetinaNet leaves out the finest).
    with frozen(model):
        cams = LayerGradCam(score, find_backbone(model)).attribute(
            inputs,
            relu_attributions=True,
            grad_kwargs=dict(allow_unused=True, materialize_grads=True),
        )
    cams = cams if isinstance(cams, tuple) else (cams,)
    return [cam[0, 0].detach().float().cpu().numpy() for cam in cams]


def class_score(subject: Subject, view: View, label: int) -> Callable[[Tensor], Tensor]:
    """Score of a class for :func:`grad_cam`.

    Of a classifier, the logit of the class. Of a segmentor, the mean logit over the pixels that
    are predicted as the class (Seg-Grad-CAM, arXiv 2002.11434), or over all if there are none.

    Raises:
        ValueError: the model has no such class.
    """
    classes = subject.classes
    if not 0 <= label < len(classes):
        names = ', '.join(classes[:10]) + (', ...' if len(classes) > 10 else '')
        raise ValueError(
            f'the model has the classes 0 to {len(classes) - 1} ({names}), got {label}'
        )

    def score(inputs: Tensor) -> Tensor:
        logits = subject.model(inputs, view.samples, mode='tensor')
        if subject.task == 'classification':
            return logits[:, label]
        predicted = logits.argmax(1) == label
        return logits[:, label][predicted if predicted.any() else ...].mean()[None]

    return score


def detection_score(subject: Subject, view: View, index: int) -> Callable[[Tensor], Tensor]:
    """Score of the ``index``-th detection, through all heads of the detector, for :func:`grad_cam`.

    Raises:
        TypeError: the model is no detector.
        ValueError: there is no such detection.
    """
    if isinstance(view.prediction, np.ndarray):
        raise TypeError(f'the model must be a detector, got one for {subject.task}')
    num = len(view.prediction.labels)
    if not 0 <= index < num:
        raise ValueError(f'there are {num} detections, 0 to {num - 1}, got {index}')

    def score(inputs: Tensor) -> Tensor:
        with _attached_scores():
            (result,) = subject.predict(inputs, view.samples)
        return result.pred_instances.scores[index : index + 1]

    return score


@contextmanager
def _attached_scores() -> Iterator[None]:
    """Keep the graph of the scores that mmdet's dense heads select; by default they detach them."""
    from mmdet.models.dense_heads import base_dense_head

    select = base_dense_head.select_single_mlvl

    def attached(maps: list[Tensor], image: int, detach: bool = True) -> list[Tensor]:
        return select(maps, image, detach=False)

    with patch.object(base_dense_head, 'select_single_mlvl', attached):
        yield


def effective_receptive_field(model: nn.Module, inputs: Tensor) -> list[np.ndarray]:
    """Dependence of the center of each feature map on each pixel (arXiv 1701.04128).

    The absolute gradient with respect to the pixels, summed over the color channels, of a random
    linear combination of the features at the center; their plain sum is constant after a LayerNorm.

    Args:
        model: a backbone of mmattn, or a model that contains one.
        inputs: normalized images (B, 3, H, W); the result is the mean over them.

    Returns:
        A float32 (H, W) that sums to 1 for each output of the backbone.
    """
    backbone = find_backbone(model)
    inputs = inputs.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    fields = []
    with frozen(backbone), torch.enable_grad():
        for output in backbone(inputs):
            center = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
            mixture = torch.randn(center.shape, generator=generator).to(center)
            (gradient,) = torch.autograd.grad(center, inputs, mixture, retain_graph=True)
            field = gradient.abs().sum((0, 1))
            fields.append((field / field.sum().clamp(min=1e-30)).float().cpu().numpy())
    return fields


def enclosing_side(field: np.ndarray, share: float) -> int:
    """Side of the smallest square, in pixels, that holds a share of a receptive field.

    Args:
        field: (H, W), from :func:`effective_receptive_field`. Its center of mass is the square's
            center.
        share: in (0, 1].
    """
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


def feature_pca(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First three principal components of a feature map's channels, as red, green and blue.

    Args:
        features: (1, C, H, W), C >= 3.

    Returns:
        float32 (H, W, 3) in [0, 1], each component scaled from its 1st to its 99th percentile; and
        the fraction of the variance that each component explains, float64 (3,).
    """
    channels = features[0].detach().double().flatten(1).T.cpu()
    channels = channels - channels.mean(0)
    _, strengths, directions = np.linalg.svd(channels.numpy(), full_matrices=False)
    directions = directions[:3]
    # The sign of a component is arbitrary. A positive largest entry makes pictures comparable.
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[range(3), largest])[:, None]
    components = channels.numpy() @ directions.T
    low, high = np.percentile(components, [1, 99], axis=0)
    colors = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    variance = strengths**2 / max((strengths**2).sum(), 1e-30)
    return colors.reshape(*features.shape[2:], 3).astype(np.float32), variance[:3]
