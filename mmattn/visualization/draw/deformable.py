"""Figures of deformable attention, as figures 6 and 7 of the DAT paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..capture import Block
from ..deformable import SamplingPoints, sampling_points, top_keys
from ..detection import Instances, class_colors, draw_instances
from ..windows import MASKED, chosen_window
from .base import (
    chosen_heads,
    legend,
    mark_query,
    outline,
    panels,
    percent,
    placeholder,
    row_title,
    set_title,
    show,
)

MAX_ARROWS = 14  # per row and per column of the grid
GROUP_COLORS = class_colors(10)
KEY_COLOR = '#ffb000'
LARGEST_CIRCLE = 130.0  # area in square points


def plot_sampling_points(
    picture: np.ndarray,
    blocks: Sequence[Block],
    model: str,
    found: Instances | None = None,
    classes: Sequence[str] = (),
    head: int | None = None,
) -> Figure:
    """Sampling points of deformable attention, by offset group, with arrows from the regular grid.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: blocks with deformable attention, one panel each.
        model: name of the model.
        found: a detector's predictions, drawn on the first panel.
        classes: names of the predictions' classes.
        head: shows only the group of this head; None shows all.
    """
    figure, axes = panels(
        1,
        len(blocks) + 1,
        picture.shape[:2],
        f'{model}: where deformable attention samples the image',
        'Every query attends to these points. Arrows start at the regular grid and end at the '
        'sampling points, moved by the predicted offsets; each color is an offset group (some '
        'heads). Of many points, only some are drawn.',
        lines=3,
    )
    first, *rest = axes[0]
    show(first, picture, 'image')
    if found is not None:
        num = len(found.labels)
        set_title(first, f'image with {num} predictions' if num else 'image: no detections')
        draw_instances(first, picture, found, classes, class_colors(len(classes)))
    shown: set[int] = set()
    for panel, block in zip(rest, blocks, strict=True):
        points = sampling_points(block)
        groups = list(range(len(points.positions)))
        if head is not None:
            groups = [head * len(groups) // block.num_heads]
        shown.update(groups)
        show(panel, picture, dim=0.75)
        step = _arrows(panel, points, groups)
        rows, columns = points.references.shape[:2]
        moves = points.positions[groups] - points.references
        shift = np.linalg.norm(moves, axis=-1).mean()
        drawn = '' if step == 1 else f' (1 in {step**2} drawn)'
        set_title(
            panel,
            f'stage {block.stage}, block {block.index}\n{rows} × {columns} points{drawn}\n'
            f'moved by {shift:.0f} px on average',
        )
    handles = [
        Line2D([], [], color=GROUP_COLORS[g % 10], marker='o', markersize=4, label=f'group {g}')
        for g in sorted(shown)
    ]
    legend(figure, handles)
    return figure


def plot_top_keys(
    picture: np.ndarray,
    blocks: Sequence[Block],
    query: tuple[float, float],
    model: str,
    head: int | None = None,
    swin: Sequence[Block] = (),
    num: int = 25,
) -> Figure:
    """Sampled keys with the highest attention of one point, as circles with area by attention.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: blocks with deformable attention, one row each.
        query: (y, x) in pixels of the picture.
        model: name of the model.
        head: the only head to show beside all heads together; None shows the first ones.
        swin: blocks of a Swin for the same picture; the one of the same stage is at the right.
        num: number of circles in a panel.
    """
    heads = [chosen_heads(block.num_heads, head) for block in blocks]
    columns = 1 + max(map(len, heads)) + bool(swin)
    figure, axes = panels(
        len(blocks),
        columns,
        picture.shape[:2],
        f'{model}: the {num} keys with the highest attention of the point at '
        f'y {int(query[0])}, x {int(query[1])}',
        'The star is the chosen point; each circle is a sampled key, its area the share of the '
        'attention that it receives. The largest circle has the same size in every panel.'
        + (' Right: the window in which Swin attends from the same point.' if swin else ''),
        lines=2,
    )
    for row, block, panel_heads in zip(axes, blocks, heads, strict=True):
        keys = top_keys(block, block.token(*query), num)
        weights = keys.weights / len(keys.weights)
        best = np.argsort(weights, axis=None)[::-1][:num]
        all_heads = keys.points.reshape(-1, 2)[best], weights.flatten()[best]
        shown = {'all heads together': all_heads}
        shown |= {f'head {h}': (keys.points[h], keys.weights[h]) for h in panel_heads}
        row_title(row[0], f'stage {block.stage}, block {block.index}')
        for panel, (whose, (points, shares)) in zip(row, shown.items(), strict=False):
            show(panel, picture, dim=0.75)
            _circles(panel, points, shares, whose)
            mark_query(panel, *query)
        for panel in row[len(shown) : columns - bool(swin)]:
            placeholder(panel, f'{block.num_heads} heads in this stage')
        if swin:
            _swin_panel(row[-1], picture, block.stage, swin, query, num)
    return figure


def _arrows(panel: Axes, points: SamplingPoints, groups: Sequence[int]) -> int:
    """Draw the points and arrows of each n-th row and column; return n."""
    step = max(1, -(-max(points.references.shape[:2]) // MAX_ARROWS))
    thin = (slice(step // 2, None, step), slice(step // 2, None, step))
    references = points.references[thin].reshape(-1, 2)
    for group in groups:
        ends = points.positions[group][thin].reshape(-1, 2)
        color = GROUP_COLORS[group % 10]
        panel.quiver(
            *references.T,
            *(ends - references).T,
            color=color,
            angles='xy',
            scale_units='xy',
            scale=1,
            width=0.004,
            headwidth=4,
            alpha=min(0.9, 0.2 + 2 / len(groups)),
        )
        panel.scatter(
            ends[:, 0], ends[:, 1], s=7, color=color, edgecolor='black', linewidth=0.3, zorder=5
        )
    return step


def _circles(panel: Axes, points: np.ndarray, shares: np.ndarray, whose: str) -> None:
    set_title(
        panel,
        f'{whose}: {percent(shares.sum())} of the\n'
        f'attention in all, the largest {percent(shares.max())}',
    )
    panel.scatter(
        points[:, 0],
        points[:, 1],
        s=LARGEST_CIRCLE * shares / shares.max(),
        facecolor=[(1, 0.69, 0, 0.25)],
        edgecolor=KEY_COLOR,
        linewidth=1.1,
    )


def _swin_panel(
    panel: Axes,
    picture: np.ndarray,
    stage: int,
    swin: Sequence[Block],
    query: tuple[float, float],
    num: int,
) -> None:
    same = [block for block in swin if block.stage == stage]
    if not same:
        placeholder(panel, f'Swin has no stage {stage}')
        return
    block = same[-1]
    window = chosen_window(block, block.token(*query))
    shares = window.weights.mean(0)
    # Tokens that the shift moved here from the opposite border are masked.
    reached = shares > MASKED
    spans = window.rows[reached.any(1)], window.columns[reached.any(0)]
    best = np.argsort(shares, axis=None)[::-1][:num]
    rows, columns = np.unravel_index(best, shares.shape)
    points = np.stack([window.columns[columns], window.rows[rows]], 1)
    shares = shares.flatten()[best]
    show(panel, picture, dim=0.75)
    _circles(panel, (points + 0.5) * block.stride, shares, f'Swin, {block.kind} window')
    rows_px, columns_px = (
        (span.min() * block.stride, (span.max() + 1) * block.stride) for span in spans
    )
    outline(panel, rows_px, columns_px)
    mark_query(panel, *query)
