"""Shared parts of the figures: panels, heat maps over an image, markers, titles and legends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

HEAT = 'inferno'
OPACITY = 0.72
QUERY_COLOR = '#00e5ff'
MAX_HEADS = 4
# In inches: a panel's width, the gap between panels, the left margin for a row's title, the right
# margin for a color bar or legend.
PANEL_INCHES = 2.6
GAP = 0.1
LEFT = 0.3
RIGHT = 0.95


def panels(
    rows: int, columns: int, shape: tuple[int, int], title: str, note: str, lines: int = 1
) -> tuple[Figure, np.ndarray]:
    """Create a figure of panels with the aspect ratio of a picture.

    Positions are computed here: matplotlib's layout takes seconds for some dozen panels.

    Args:
        rows, columns: number of panels.
        shape: height and width of the picture; only their ratio counts.
        title: title of the figure.
        note: explanation at the bottom.
        lines: lines of text in each panel's title.

    Returns:
        The figure and its axes, an object array (rows, columns).
    """
    ratio = min(max(shape[0] / shape[1], 0.35), 1.6)
    panel_height, head = PANEL_INCHES * ratio, 0.1 + 0.16 * lines
    width = LEFT + columns * (PANEL_INCHES + GAP) + RIGHT
    title_lines = textwrap.wrap(title, int(width * 9.5))
    note_lines = textwrap.wrap(note, int(width * 13))
    top, bottom = 0.2 + 0.22 * len(title_lines), 0.12 + 0.17 * len(note_lines)
    height = top + rows * (panel_height + head) + bottom

    figure = Figure(figsize=(width, height), dpi=100)
    figure.text(0.5, 1 - 0.08 / height, '\n'.join(title_lines), ha='center', va='top', fontsize=12)
    figure.text(
        0.5,
        0.06 / height,
        '\n'.join(note_lines),
        ha='center',
        va='bottom',
        fontsize=9,
        color='0.3',
    )
    axes = np.empty((rows, columns), object)
    for row, column in np.ndindex(rows, columns):
        left = LEFT + column * (PANEL_INCHES + GAP)
        low = height - top - (row + 1) * (panel_height + head)
        bounds = (left / width, low / height, PANEL_INCHES / width, panel_height / height)
        axes[row, column] = figure.add_axes(bounds)
        axes[row, column].set_axis_off()
    return figure, axes


def show(axes: Axes, picture: np.ndarray, title: str = '', dim: float = 1.0) -> None:
    """Draw a picture in a panel, in pixels; a brightness ``dim`` below 1 also turns it gray."""
    height, width = picture.shape[:2]
    if dim < 1:
        picture = gray(picture) * dim
    axes.imshow(picture.astype(np.uint8), extent=(0, width, height, 0), interpolation='bilinear')
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    set_title(axes, title)


def set_title(axes: Axes, title: str) -> None:
    """Set a panel's title, at a fixed height: matplotlib's automatic placement is slow."""
    axes.set_title(title, fontsize=9, y=1.0, pad=4)


def gray(picture: np.ndarray) -> np.ndarray:
    """Gray version of a picture (H, W, 3), with contrast for heat maps over dark photographs."""
    values = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low, high = np.percentile(values, [1, 99])
    values = 20 + 220 * ((values - low) / max(high - low, 1)).clip(0, 1)
    return np.repeat(values[..., None], 3, 2)


def heat(
    axes: Axes,
    picture: np.ndarray,
    values: np.ndarray,
    stride: float,
    scale: Normalize,
    title: str = '',
) -> AxesImage:
    """Draw a heat map (h, w) of tokens of ``stride`` pixels over a gray version of the picture.

    On a logarithmic scale, values of 0 or less are transparent.
    """
    show(axes, picture, title, dim=0.9)
    rows, columns = values.shape
    extent = (0, columns * stride, rows * stride, 0)
    image = axes.imshow(
        values, extent=extent, cmap=HEAT, norm=scale, alpha=OPACITY, interpolation='nearest'
    )
    height, width = picture.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0))
    return image


def color_bar(figure: Figure, axes: Axes, scale: Normalize, label: str) -> None:
    """Draw a row's color bar at the right of its last panel."""
    box, inch = axes.get_position(), 1 / figure.get_figwidth()
    bar_axes = figure.add_axes((1 - (RIGHT - 0.1) * inch, box.y0, 0.13 * inch, box.height))
    bar = figure.colorbar(ScalarMappable(norm=scale, cmap=HEAT), cax=bar_axes)
    bar.set_label(label, fontsize=8)
    bar_axes.tick_params(labelsize=7)


def legend(figure: Figure, handles: Sequence) -> None:
    """Draw the legend of markers, in the right margin."""
    corner = (1 - (RIGHT - 0.02) / figure.get_figwidth(), 0.9)
    figure.legend(
        handles=handles, loc='upper left', bbox_to_anchor=corner, fontsize=8, frameon=False
    )


def mark_query(axes: Axes, y: float, x: float) -> None:
    """Draw a star at a point, in pixels."""
    axes.plot(
        x,
        y,
        marker='*',
        markersize=13,
        color=QUERY_COLOR,
        markeredgecolor='black',
        markeredgewidth=0.8,
        zorder=50,
    )


def outline(
    axes: Axes,
    rows: tuple[float, float],
    columns: tuple[float, float],
    color: str = QUERY_COLOR,
    linewidth: float = 1.5,
    zorder: int = 40,
) -> None:
    """Draw a rectangle from its first and last rows and columns, in pixels."""
    axes.add_patch(
        Rectangle(
            (columns[0], rows[0]),
            columns[1] - columns[0],
            rows[1] - rows[0],
            fill=False,
            edgecolor=color,
            linewidth=linewidth,
            zorder=zorder,
        )
    )


def percent(share: float) -> str:
    """Format a share as a percentage with two significant digits."""
    return f'{100 * share:.0f} %' if share > 0.095 else f'{100 * share:.2g} %'


def placeholder(axes: Axes, text: str) -> None:
    """Write a text in the middle of an empty panel."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha='center', va='center', fontsize=9, color='0.35', wrap=True)


def row_title(axes: Axes, text: str) -> None:
    """Write a title at the left of a row of panels."""
    axes.text(
        -0.03,
        0.5,
        text,
        transform=axes.transAxes,
        rotation=90,
        ha='right',
        va='center',
        fontsize=9,
    )


def chosen_heads(num_heads: int, head: int | None) -> list[int]:
    """Heads that get a panel: the given one, or the first few."""
    return [head] if head is not None else list(range(min(num_heads, MAX_HEADS)))


def rendered(figure: Figure) -> np.ndarray:
    """Render a figure to pixels, uint8 RGB (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
