"""Grad-CAM (arXiv 1610.02391) of a class or of a detection, through captum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

from .capture import find_backbone, frozen
from .subject import Subject, View


def grad_cam(
    model: nn.Module, inputs: Tensor, score: Callable[[Tensor], Tensor]
) -> list[np.ndarray]:
    """Which places of the backbone's maps raise a score.

    Args:
        model: a backbone of ours, or a model with one inside.
        inputs: normalised images (1, 3, H, W).
        score: inputs -> the score to explain, (1,), by a forward pass of ``model``.

    Returns:
        For each output of the backbone a float32 (H_i, W_i), from 0; all 0 where the score does not depend on it.

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
    """What Grad-CAM explains of a classifier or segmentor.

    A classifier's logit of the class; a segmentor's, as the mean over the pixels that it gave the class
    (Seg-Grad-CAM, arXiv 2002.11434), or over all if there are none.
    """
    if not 0 <= label < len(subject.classes):
        raise ValueError(
            f'the model has the classes 0 to {len(subject.classes) - 1} '
            f'({", ".join(subject.classes[:10])}{", ..." if len(subject.classes) > 10 else ""}), got {label}'
        )

    def score(inputs: Tensor) -> Tensor:
        logits = subject.model(inputs, view.samples, mode='tensor')
        if subject.task == 'classification':
            return logits[:, label]
        own = logits.argmax(1) == label
        return logits[:, label][own if own.any() else ...].mean()[None]

    return score


def detection_score(subject: Subject, view: View, index: int) -> Callable[[Tensor], Tensor]:
    """What Grad-CAM explains of a detector: the score of its ``index``-th detection, through all its heads."""
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
    """Let mmdet's dense heads choose among scores with their graph, which they otherwise detach."""
    from mmdet.models.dense_heads import base_dense_head

    select = base_dense_head.select_single_mlvl

    def attached(maps, image, detach=True):
        return select(maps, image, detach=False)

    with patch.object(base_dense_head, 'select_single_mlvl', attached):
        yield
