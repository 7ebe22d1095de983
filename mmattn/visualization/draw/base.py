"""What the pictures share: panels with an image, heat maps over it, markers, and the space for titles."""

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
# In inches: a panel, the space between two, the margins for a row's title and for a color bar or legend.
PANEL_INCHES = 2.6
GAP = 0.1
LEFT = 0.3
RIGHT = 0.95


def panels(
    rows: int, columns: int, shape: tuple[int, int], title: str, note: str, lines: int = 1
) -> tuple[Figure, np.ndarray]:
    """A figure of panels in the shape of a picture, and its axes (rows, columns).

    Places are computed here: matplotlib's own layout takes seconds for some dozen panels.

    Args:
        rows, columns: how many.
        shape: height and width of what they hold; only the ratio counts.
        title: what the figure shows, of which model.
        note: how to read it, at the bottom.
        lines: of the panels' titles.
    """
    ratio = min(max(shape[0] / shape[1], 0.35), 1.6)
    panel_height, head = PANEL_INCHES * ratio, 0.1 + 0.16 * lines
    width = LEFT + columns * (PANEL_INCHES + GAP) + RIGHT
    title = textwrap.wrap(title, int(width * 9.5))
    note = textwrap.wrap(note, int(width * 13))
    top, bottom = 0.2 + 0.22 * len(title), 0.12 + 0.17 * len(note)
    height = top + rows * (panel_height + head) + bottom

    figure = Figure(figsize=(width, height), dpi=100)
    figure.text(0.5, 1 - 0.08 / height, '\n'.join(title), ha='center', va='top', fontsize=12)
    figure.text(
        0.5, 0.06 / height, '\n'.join(note), ha='center', va='bottom', fontsize=9, color='0.3'
    )
    axes = np.empty((rows, columns), object)
    for row, column in np.ndindex(rows, columns):
        left = LEFT + column * (PANEL_INCHES + GAP)
        low = height - top - (row + 1) * (panel_height + head)
        place = (left / width, low / height, PANEL_INCHES / width, panel_height / height)
        axes[row, column] = figure.add_axes(place)
        axes[row, column].set_axis_off()
    return figure, axes


def show(axes: Axes, picture: np.ndarray, title: str = '', dim: float = 1.0) -> None:
    """The picture in a panel, in pixels; ``dim`` below 1 turns it gray and darker."""
    height, width = picture.shape[:2]
    if dim < 1:
        picture = gray(picture) * dim
    axes.imshow(picture.astype(np.uint8), extent=(0, width, height, 0), interpolation='bilinear')
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    set_title(axes, title)


def set_title(axes: Axes, title: str) -> None:
    """A panel's title; at a fixed height, which spares matplotlib the search for one."""
    axes.set_title(title, fontsize=9, y=1.0, pad=4)


def gray(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) without color, stretched so that dark photographs can be made out below a heat map."""
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
    """A heat map (h, w) of tokens of ``stride`` pixels over the picture, which turns gray.

    Values of 0 or less stay clear where the scale is logarithmic.
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


def color_bar(axes: Axes, scale: Normalize, label: str) -> None:
    """The meaning of a row's colors, at the right of its last panel."""
    figure, place = axes.figure, axes.get_position()
    inch = 1 / figure.get_figwidth()
    bar_axes = figure.add_axes((1 - (RIGHT - 0.1) * inch, place.y0, 0.13 * inch, place.height))
    bar = figure.colorbar(ScalarMappable(norm=scale, cmap=HEAT), cax=bar_axes)
    bar.set_label(label, fontsize=8)
    bar_axes.tick_params(labelsize=7)


def legend(figure: Figure, handles: Sequence, **options) -> None:
    """The meaning of markers, in the margin at the right."""
    place = (1 - (RIGHT - 0.02) / figure.get_figwidth(), 0.9)
    figure.legend(
        handles=handles,
        loc='upper left',
        bbox_to_anchor=place,
        fontsize=8,
        frameon=False,
        **options,
    )


def mark_query(axes: Axes, y: float, x: float) -> None:
    """A star at a point in pixels."""
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


def outline(axes: Axes, rows: tuple[float, float], columns: tuple[float, float], **style) -> None:
    """A rectangle in pixels, from the first to the second of each."""
    options = dict(fill=False, edgecolor=QUERY_COLOR, linewidth=1.5, zorder=40) | style
    corner = (columns[0], rows[0])
    axes.add_patch(Rectangle(corner, columns[1] - columns[0], rows[1] - rows[0], **options))


def percent(share: float) -> str:
    """A share in two significant digits."""
    return f'{100 * share:.0f} %' if share > 0.095 else f'{100 * share:.2g} %'


def placeholder(axes: Axes, text: str) -> None:
    """Words in the middle of an empty panel."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha='center', va='center', fontsize=9, color='0.35', wrap=True)


def row_title(axes: Axes, text: str) -> None:
    """Words at the left of a row of panels."""
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
    """Which heads get a panel: the one that is asked for, or the first few."""
    return [head] if head is not None else list(range(min(num_heads, MAX_HEADS)))


def rendered(figure: Figure) -> np.ndarray:
    """Pixels of a figure, uint8 RGB (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
