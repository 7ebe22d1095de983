"""Predictions beside what is true, for all three tasks."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..detection import Instances, class_colors, draw_instances
from ..subject import IGNORED
from .base import set_title, gray, legend, panels, show

TOP = 5  # classes of a classifier
MAX_LEGEND = 10  # the largest segments are named


def plot_prediction(
    picture: np.ndarray,
    prediction: Instances | np.ndarray,
    truth: Instances | np.ndarray | int | None,
    classes: Sequence[str],
    model: str,
    threshold: float = 0.5,
) -> Figure:
    """The annotation, if there is one, and what the model says.

    Args:
        picture: uint8 RGB (H, W, 3).
        prediction: :class:`Instances`, labels (H, W), or probabilities (classes,).
        truth: the same, a class index beside probabilities, or None.
        classes: their names.
        model: name of the model.
        threshold: detections of a lower score are not drawn.
    """
    figure, axes = panels(1, 3, picture.shape[:2], f'{model}: prediction', '', lines=2)
    first, second, third = axes[0]
    show(first, picture, 'image')
    colors = class_colors(len(classes))
    if isinstance(prediction, Instances):
        found = prediction.above(threshold)
        _instances(second, picture, truth, classes, colors)
        _instances(third, picture, found, classes, colors)
        set_title(third, f'prediction: {len(found.labels)} with a score ≥ {threshold:g}')
        return figure
    if prediction.ndim == 1:
        second.set_axis_on()
        _bars(second, prediction, truth, classes)
        second.set_position(_shrunk(second))
        third.remove()
        return figure
    shown = prediction if truth is None else np.stack([prediction, truth])
    labels, areas = np.unique(shown[shown != IGNORED], return_counts=True)
    labels = labels[np.argsort(-areas)]
    palette = dict(
        zip(labels, matplotlib.colormaps['tab20'](np.arange(len(labels)) % 20), strict=True)
    )
    if truth is None:
        show(second, picture, 'no ground truth')
        _segments(third, picture, prediction, palette, 'prediction')
    else:
        known = truth != IGNORED
        right = (prediction == truth)[known].mean() if known.any() else 0
        _segments(second, picture, truth, palette, 'ground truth\n(gray: not annotated)')
        title = f'prediction:\n{right:.0%} of the annotated pixels right'
        _segments(third, picture, prediction, palette, title)
    handles = [Patch(color=color, label=classes[label]) for label, color in palette.items()]
    legend(figure, handles[:MAX_LEGEND])
    return figure


def _instances(panel, picture, instances, classes, colors) -> None:
    if instances is None:
        show(panel, picture, 'no ground truth')
        return
    draw_instances(panel, picture, instances, classes, colors)
    set_title(panel, f'ground truth: {len(instances.labels)}')


def _segments(panel, picture, labels, palette, title) -> None:
    colored = gray(picture) / 255
    for label, color in palette.items():
        place = labels == label
        colored[place] = 0.35 * colored[place] + 0.65 * color[:3]
    show(panel, (255 * colored).astype(np.uint8), title)


def _shrunk(axes) -> tuple[float, float, float, float]:
    """Room for the names of classes at the left of bars, in the place of two panels."""
    place = axes.get_position()
    return place.x0 + 0.6 * place.width, place.y0 + 0.1, 1.2 * place.width, place.height - 0.12


def _bars(panel, probabilities, truth, classes) -> None:
    best = np.argsort(probabilities)[::-1][:TOP]
    names = [classes[label] for label in best]
    right = ['C2' if truth is not None and label == truth else 'C0' for label in best]
    bars = panel.barh(range(len(best)), 100 * probabilities[best], color=right)
    panel.bar_label(bars, [f'{100 * p:.1f} %' for p in probabilities[best]], padding=3, fontsize=8)
    panel.set_yticks(range(len(best)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 130)
    panel.set_xticks([0, 50, 100], ['0 %', '50 %', '100 %'], fontsize=8)
    panel.spines[['top', 'right']].set_visible(False)
    known = 'no ground truth' if truth is None else f'ground truth: {classes[truth]}'
    set_title(panel, f'probability of the {len(best)} likeliest classes\n{known}')
