"""All pictures of an image and a model, as functions that draw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from .capture import Block, Capture
from .detection import Instances
from .draw.deformable import plot_sampling_points, plot_top_keys
from .draw.maps import plot_features, plot_grad_cam, plot_receptive_field
from .draw.predictions import plot_prediction
from .draw.quadtree import plot_kept_patches
from .draw.windows import plot_chosen_window, plot_received_attention
from .explain import class_score, detection_score, effective_receptive_field, grad_cam
from .subject import Subject, View

WINDOW_KINDS = ('local', 'shifted', 'global')
MAX_QUERIES = 2  # detections that give queries, if none are given

Pictures = dict[str, Callable[[], Figure]]


@dataclass(frozen=True)
class PictureOptions:
    """Options of the pictures.

    Attributes:
        queries: points (y, x) in pixels of the picture; if empty, the centers of the best
            detections, or of the image.
        stage: the only stage to show; None shows all.
        head: the only head to show beside the mean of all; None shows the first ones.
        label: class for Grad-CAM; None takes the best detection, or the most probable class.
        threshold: detections with a lower score are left out.
    """

    queries: Sequence[tuple[float, float]] = field(default_factory=tuple)
    stage: int | None = None
    head: int | None = None
    label: int | None = None
    threshold: float = 0.5


def attention_pictures(
    picture: np.ndarray,
    seen: Capture,
    model: str,
    options: PictureOptions,
    found: Instances | None = None,
    classes: Sequence[str] = (),
    swin: Sequence[Block] = (),
    other: tuple[np.ndarray, Capture] | None = None,
) -> Pictures:
    """Pictures of a model's attention, by name, for any family.

    Args:
        picture: uint8 RGB (H, W, 3).
        seen: recorded forward pass for the picture.
        model: name of the model.
        options: stages, heads, queries and thresholds to show.
        found: a detector's predictions.
        classes: names of the predictions' classes.
        swin: blocks of a Swin for the same picture.
        other: a second picture of the same size and its recorded forward pass.

    Raises:
        ValueError: there is no such stage or head; the message lists what there is.
    """
    blocks = seen.last_blocks()
    if options.stage is not None:
        seen.block(options.stage)
        blocks = [block for block in blocks if block.stage == options.stage]
    if options.head is not None:
        with_head = [block for block in blocks if options.head < block.num_heads]
        if not with_head or options.head < 0:
            raise ValueError(f'there is no head {options.head}; there is {seen.summary()}')
        blocks = with_head
    queries = options.queries or default_queries(picture, found)
    head = options.head

    pictures: Pictures = {}
    for kind in WINDOW_KINDS:
        if matching := _of_kind(blocks, kind):
            pictures[f'attention_{kind}'] = partial(
                plot_received_attention, picture, matching, model, head
            )
    windows, deformable, quadtree = (
        _of_kind(blocks, *kinds) for kinds in (WINDOW_KINDS, ('deformable',), ('quadtree',))
    )
    if deformable:
        pictures['sampling_points'] = partial(
            plot_sampling_points, picture, deformable, model, found, classes, head
        )
    for i, query in enumerate(queries):
        if windows and not deformable:
            pictures[f'window_{i}'] = partial(
                plot_chosen_window, picture, windows, query, model, head
            )
        if deformable:
            pictures[f'keys_{i}'] = partial(
                plot_top_keys, picture, deformable, query, model, head, swin
            )
        if quadtree:
            pictures[f'kept_{i}'] = partial(
                plot_kept_patches, picture, quadtree, query, model, head
            )
        if quadtree and other:
            second = other[0], other[1].blocks
            pictures[f'kept_between_{i}'] = partial(
                plot_kept_patches, picture, quadtree, query, model, head, second
            )
    return pictures


def model_pictures(
    subject: Subject,
    view: View,
    truth: Instances | np.ndarray | int | None,
    options: PictureOptions,
) -> Pictures:
    """Pictures for every family: prediction, Grad-CAM, receptive fields, features.

    Args:
        subject: the model.
        view: one image.
        truth: annotation of the image, or None.
        options: stages, heads, queries and thresholds to show.
    """
    picture, size = view.picture, _input_size(view)
    return dict(
        prediction=partial(
            plot_prediction,
            picture,
            view.prediction,
            truth,
            subject.classes,
            subject.name,
            options.threshold,
        ),
        grad_cam=partial(_grad_cam, subject, view, options),
        receptive_field=lambda: plot_receptive_field(
            picture,
            effective_receptive_field(subject.model, view.inputs),
            [2 ** round(float(np.log2(size[0] / f.shape[2]))) for f in view.seen.features],
            subject.name,
        ),
        features=partial(plot_features, picture, view.seen.features, size, subject.name),
    )


def default_queries(picture: np.ndarray, found: Instances | None) -> list[tuple[float, float]]:
    """Centers (y, x) of the best detections, or of the picture if there are none."""
    if found is None or not len(found.labels):
        height, width = picture.shape[:2]
        return [(height / 2, width / 2)]
    order = np.argsort(-found.predicted_scores())[:MAX_QUERIES]
    limits = np.array(picture.shape[:2]) - 1
    centers = (found.boxes[order][:, [1, 0]] + found.boxes[order][:, [3, 2]]) / 2
    return [(float(y), float(x)) for y, x in centers.clip(0, limits)]


def _of_kind(blocks: Sequence[Block], *kinds: str) -> list[Block]:
    return [block for block in blocks if block.kind in kinds]


def _input_size(view: View) -> tuple[int, int]:
    height, width = view.inputs.shape[2:]
    return height, width


def _grad_cam(subject: Subject, view: View, options: PictureOptions) -> Figure:
    prediction, classes = view.prediction, subject.classes
    box = None
    if isinstance(prediction, Instances):
        index = _detection(prediction, options.label, classes)
        label = prediction.labels[index]
        target = f'the detection {classes[label]} {prediction.predicted_scores()[index]:.2f}'
        box = prediction.boxes[index]
        score = detection_score(subject, view, index)
    else:
        label = options.label
        if label is None:
            counts = prediction if prediction.ndim == 1 else np.bincount(prediction.ravel())
            label = int(np.argmax(counts))
        score = class_score(subject, view, label)
        target = f'the class {classes[label]}'
    cams = grad_cam(subject.model, view.inputs, score)
    return plot_grad_cam(view.picture, cams, _input_size(view), target, subject.name, box)


def _detection(found: Instances, label: int | None, classes: Sequence[str]) -> int:
    """Index of the detection with the highest score, of a class if ``label`` is given."""
    candidates = (
        np.flatnonzero(found.labels == label) if label is not None else np.arange(len(found.labels))
    )
    if not len(candidates):
        there = ', '.join(sorted({classes[i] for i in found.labels})) or 'nothing'
        what = 'anything' if label is None else classes[label]
        raise ValueError(
            f'the model has not detected {what} that Grad-CAM could explain, but {there}'
        )
    return int(candidates[np.argmax(found.predicted_scores()[candidates])])
