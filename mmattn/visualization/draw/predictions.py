"""Figures of predictions beside the ground truth, for all three tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..detection import Instances, class_colors, draw_instances
from ..subject import IGNORED
from .base import gray, legend, panels, set_title, show

TOP = 5  # most probable classes of a classifier
MAX_LEGEND = 10  # classes with the largest area, in the legend

Color = tuple[float, float, float, float]  # RGBA in [0, 1]


def plot_prediction(
    picture: np.ndarray,
    prediction: Instances | np.ndarray,
    truth: Instances | np.ndarray | int | None,
    classes: Sequence[str],
    model: str,
    threshold: float = 0.5,
) -> Figure:
    """Image, ground truth and prediction side by side.

    Args:
        picture: uint8 RGB (H, W, 3).
        prediction: :class:`Instances`, labels (H, W), or probabilities (classes,).
        truth: annotation in the form of the prediction; a class index beside probabilities; or
            None.
        classes: names of the classes.
        model: name of the model.
        threshold: detections with a lower score are not drawn.
    """
    figure, axes = panels(1, 3, picture.shape[:2], f'{model}: prediction', '', lines=2)
    first, second, third = axes[0]
    show(first, picture, 'image')
    if isinstance(prediction, Instances):
        found, colors = prediction.above(threshold), class_colors(len(classes))
        annotated = cast(Instances | None, truth)
        _instances(second, picture, annotated, classes, colors)
        _instances(third, picture, found, classes, colors)
        set_title(third, f'prediction: {len(found.labels)} with a score ≥ {threshold:g}')
    elif prediction.ndim == 1:
        third.remove()
        second.set_axis_on()
        _bars(second, prediction, cast(int | None, truth), classes)
        second.set_position(_bar_bounds(second))
    else:
        palette = _segmentation(second, third, picture, prediction, cast(np.ndarray | None, truth))
        handles = [Patch(color=color, label=classes[label]) for label, color in palette.items()]
        legend(figure, handles[:MAX_LEGEND])
    return figure


def _segmentation(
    left: Axes, right: Axes, picture: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None
) -> dict[int, Color]:
    """Draw ground truth and prediction; return the color of each class, largest area first."""
    shown = prediction if truth is None else np.stack([prediction, truth])
    labels, areas = np.unique(shown[shown != IGNORED], return_counts=True)
    labels = labels[np.argsort(-areas)]
    tab20 = matplotlib.colormaps['tab20']
    palette = {label: tab20(i % 20) for i, label in enumerate(labels)}
    title = 'prediction'
    if truth is None:
        show(left, picture, 'no ground truth')
    else:
        known = truth != IGNORED
        accuracy = (prediction[known] == truth[known]).mean() if known.any() else 0
        _segments(left, picture, truth, palette, 'ground truth\n(gray: not annotated)')
        title = f'prediction:\n{accuracy:.0%} of the annotated pixels correct'
    _segments(right, picture, prediction, palette, title)
    return palette


def _instances(
    panel: Axes,
    picture: np.ndarray,
    instances: Instances | None,
    classes: Sequence[str],
    colors: np.ndarray,
) -> None:
    if instances is None:
        show(panel, picture, 'no ground truth')
        return
    draw_instances(panel, picture, instances, classes, colors)
    set_title(panel, f'ground truth: {len(instances.labels)}')


def _segments(
    panel: Axes,
    picture: np.ndarray,
    labels: np.ndarray,
    palette: Mapping[int, Color],
    title: str,
) -> None:
    colored = gray(picture) / 255
    for label, color in palette.items():
        mask = labels == label
        colored[mask] = 0.35 * colored[mask] + 0.65 * np.array(color[:3])
    show(panel, (255 * colored).astype(np.uint8), title)


def _bar_bounds(axes: Axes) -> tuple[float, float, float, float]:
    """Bounds of a bar chart over two panels, with a margin for class names at the left."""
    box = axes.get_position()
    return box.x0 + 0.6 * box.width, box.y0 + 0.1, 1.2 * box.width, box.height - 0.12


def _bars(
    panel: Axes, probabilities: np.ndarray, truth: int | None, classes: Sequence[str]
) -> None:
    best = np.argsort(probabilities)[::-1][:TOP]
    names = [classes[label] for label in best]
    colors = ['C2' if truth is not None and label == truth else 'C0' for label in best]
    bars = panel.barh(range(len(best)), 100 * probabilities[best], color=colors)
    panel.bar_label(bars, [f'{100 * p:.1f} %' for p in probabilities[best]], padding=3, fontsize=8)
    panel.set_yticks(range(len(best)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 130)
    panel.set_xticks([0, 50, 100], ['0 %', '50 %', '100 %'], fontsize=8)
    panel.spines[['top', 'right']].set_visible(False)
    known = 'no ground truth' if truth is None else f'ground truth: {classes[truth]}'
    set_title(panel, f'{len(best)} most probable classes\n{known}')
