"""Detected and annotated instances, drawn on their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

PANEL_INCHES = 3.1
LABEL_POINTS = 8


@dataclass
class Instances:
    """The n objects of one image, annotated or predicted.

    Args:
        labels: class indices, int (n,).
        boxes: (n, 4) as x1, y1, x2, y2 in pixels.
        masks: bool (n, H, W); None if there are only boxes.
        scores: (n,) in [0, 1]; None for annotations.
    """

    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None
    scores: np.ndarray | None = None

    def predicted_scores(self) -> np.ndarray:
        """Scores (n,) of predictions.

        Raises:
            TypeError: the instances are annotations.
        """
        if self.scores is None:
            raise TypeError('instances must be predictions, got annotations without scores')
        return self.scores

    def above(self, threshold: float) -> Instances:
        """Predictions with at least this score.

        Raises:
            TypeError: the instances are annotations.
        """
        scores = self.predicted_scores()
        keep = scores >= threshold
        masks = None if self.masks is None else self.masks[keep]
        return Instances(self.labels[keep], self.boxes[keep], masks, scores[keep])


def plot_predictions(
    examples: Sequence[tuple[np.ndarray, Instances, Instances]],
    classes: Sequence[str],
    title: str,
    score_threshold: float = 0.5,
) -> Figure:
    """Pairs of panels, annotated and predicted instances of an image, two pairs in a row.

    Args:
        examples: (image uint8 RGB (H, W, 3), annotated instances, predicted instances).
        classes: class names; each has one color in all panels, shown in a legend.
        title: title of the figure.
        score_threshold: predictions below it are not drawn.
    """
    colors = class_colors(len(classes))
    height, width = examples[0][0].shape[:2]
    rows = -(-len(examples) // 2)
    panel_height = PANEL_INCHES * height / width
    figure = Figure(figsize=(4 * PANEL_INCHES + 0.6, rows * (panel_height + 0.3) + 1), dpi=100)
    figure.set_layout_engine('constrained', w_pad=0.02, h_pad=0.03, rect=(0.005, 0, 0.99, 0.99))
    figure.suptitle(title, fontsize=13)
    for pair, example in zip(
        figure.subfigures(rows, 2, squeeze=False, wspace=0.05).flat, examples, strict=False
    ):
        image, truth, predicted = example
        axes = pair.subplots(1, 2)
        panels = {
            'ground truth': truth,
            f'prediction (score ≥ {score_threshold:g})': predicted.above(score_threshold),
        }
        for panel, (name, instances) in zip(axes, panels.items(), strict=True):
            panel.set_title(name, fontsize=10)
            draw_instances(panel, image, instances, classes, colors)
    figure.legend(
        handles=[
            Patch(color=color, label=name) for name, color in zip(classes, colors, strict=True)
        ],
        loc='outside lower center',
        ncols=len(classes),
        frameon=False,
    )
    return figure


def class_colors(num: int) -> np.ndarray:
    """Distinct colors, RGB (num, 3) in [0, 1]."""
    if num <= 10:
        return matplotlib.colormaps['tab10'](np.arange(num))[:, :3]
    return matplotlib.colormaps['hsv'](np.arange(num) / num)[:, :3]


def draw_instances(
    axes: Axes, image: np.ndarray, instances: Instances, classes: Sequence[str], colors: np.ndarray
) -> None:
    """Draw an image (H, W, 3) with masks, boxes, class names and, of predictions, scores."""
    height, width = image.shape[:2]
    axes.imshow(image, interpolation='bilinear', extent=(0, width, height, 0))
    axes.set_axis_off()
    halo = [withStroke(linewidth=3.5, foreground='white')]
    for i, (label, box) in enumerate(zip(instances.labels, instances.boxes, strict=True)):
        color = colors[label]
        contours = []
        if instances.masks is not None:
            mask = instances.masks[i].astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        for contour in contours:
            outline = np.concatenate([contour, contour[:1]])[:, 0] + 0.5
            axes.plot(*outline.T, color=color, linewidth=2, path_effects=halo, zorder=2 + i)
        corner, (box_width, box_height) = box[:2], box[2:] - box[:2]
        axes.add_patch(
            Rectangle(corner, box_width, box_height, fill=False, edgecolor=color, zorder=2 + i)
        )
    axes.set(xlim=(0, width), ylim=(height, 0))
    texts = [classes[label] for label in instances.labels]
    if instances.scores is not None:
        texts = [f'{text} {score:.2f}' for text, score in zip(texts, instances.scores, strict=True)]
    pixels_per_point = width / (PANEL_INCHES * 72)
    spots = place_labels(texts, instances.boxes, (height, width), LABEL_POINTS * pixels_per_point)
    for text, spot, label in zip(texts, spots, instances.labels, strict=True):
        axes.text(
            *spot,
            text,
            va='top',
            fontsize=LABEL_POINTS,
            fontfamily='monospace',
            color='white',
            zorder=100,
            bbox=dict(facecolor=colors[label], edgecolor='white', linewidth=0.5, pad=1),
        )


def place_labels(
    texts: Sequence[str], boxes: np.ndarray, size: tuple[int, int], text_height: float
) -> list[tuple[float, float]]:
    """Top left corners (x, y) for the labels of boxes, inside the image and without overlap.

    Each label takes the first free position above, below or inside its box; if none is free, the
    one with the least overlap.

    Args:
        texts: labels, in a font whose letters are 0.6 times as wide as high.
        boxes: (n, 4) as x1, y1, x2, y2 in pixels.
        size: (height, width) of the image in pixels.
        text_height: in pixels.
    """
    image_height, image_width = size
    line = text_height * 1.55
    taken = np.empty((0, 4))
    for text, (x1, y1, x2, y2) in zip(texts, boxes, strict=True):
        text_width = text_height * (0.6 * len(text) + 0.6)
        positions = [
            (x, y)
            for y in (y1 - line, y2, y1, y2 - line, (y1 + y2 - line) / 2)
            for x in (x1, x2 - text_width, (x1 + x2 - text_width) / 2)
        ]
        x = np.clip([position[0] for position in positions], 0, max(image_width - text_width, 0))
        y = np.clip([position[1] for position in positions], 0, max(image_height - line, 0))
        spots = np.stack([x, y, x + text_width, y + line], 1)
        low = np.maximum(spots[:, None, :2], taken[None, :, :2])
        high = np.minimum(spots[:, None, 2:], taken[None, :, 2:])
        overlap = np.clip(high - low, 0, None).prod(2).sum(1)
        taken = np.concatenate([taken, spots[[np.argmin(overlap)]]])
    return [(float(x), float(y)) for x, y in taken[:, :2]]
