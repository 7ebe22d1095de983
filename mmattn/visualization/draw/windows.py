"""Figures of window attention, as in section 5 of the GC ViT paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..capture import Block
from ..windows import chosen_window, received_attention
from .base import (
    chosen_heads,
    color_bar,
    heat,
    mark_query,
    outline,
    panels,
    placeholder,
    row_title,
    show,
)


def plot_received_attention(
    picture: np.ndarray, blocks: Sequence[Block], model: str, head: int | None = None
) -> Figure:
    """Attention that tokens receive in their windows: the mean of the heads and some heads.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: blocks with window attention of one kind, one row each.
        model: name of the model.
        head: the only head to show beside the mean; None shows the first ones.
    """
    heads = [chosen_heads(block.num_heads, head) for block in blocks]
    columns = 2 + max(map(len, heads))
    kind = blocks[0].kind
    who = 'the global query attends' if kind == 'global' else 'the tokens of its window attend'
    figure, axes = panels(
        len(blocks),
        columns,
        picture.shape[:2],
        f'{model}: attention of {kind} blocks over the image',
        f'How much {who} to a token, relative to uniform attention over all visible tokens: 1 is '
        'average, bright is the most. White lines: the windows.',
    )
    for row, block, panel_heads in zip(axes, blocks, heads, strict=True):
        received = received_attention(block)
        maps = {f'mean of {block.num_heads} heads': received.mean(0)}
        maps |= {f'head {h}': received[h] for h in panel_heads}
        if block.num_heads == 1:
            maps = {'the only head': received[0]}
        scale = Normalize(0, max(np.percentile(np.stack(list(maps.values())), 99.5), 2))
        show(row[0], picture, f'image, windows of {block.module.window_size} tokens')
        _window_grid(row[0], picture, block)
        row_title(row[0], f'stage {block.stage}, block {block.index}')
        for panel, (name, values) in zip(row[1:], maps.items(), strict=False):
            heat(panel, picture, values, block.stride, scale, name)
        for panel in row[1 + len(maps) :]:
            placeholder(panel, f'{block.num_heads} head{"s" * (block.num_heads > 1)} in this stage')
        color_bar(figure, row[-1], scale, 'times the average')
    return figure


def plot_chosen_window(
    picture: np.ndarray,
    blocks: Sequence[Block],
    query: tuple[float, float],
    model: str,
    head: int | None = None,
) -> Figure:
    """Attention in the window around a point: of the point, and the mean of the window's queries.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: blocks with window attention, one row each.
        query: (y, x) in pixels of the picture.
        model: name of the model.
        head: the head to show; None takes the mean of all heads.
    """
    figure, axes = panels(
        len(blocks),
        3,
        (3, 4),
        f'{model}: attention in the window around y {int(query[0])}, x {int(query[1])}, '
        + ('mean of heads' if head is None else f'head {head}'),
        'Left: the window (frame) that contains the chosen point (star). Middle and right: only '
        'that window; bright tokens receive most attention. A global block uses the same queries '
        "in all windows, so its star only selects the query's position in the window.",
    )
    for row, block in zip(axes, blocks, strict=True):
        stride, token = block.stride, block.token(*query)
        window = chosen_window(block, token)
        shares = [w.mean(0) if head is None else w[head] for w in window[2:]]
        scale = Normalize(0, 100 * max(share.max() for share in shares))
        show(row[0], picture, block.title)
        mark_query(row[0], *query)
        spans = [_spans(window.rows, stride), _spans(window.columns, stride)]
        for rows in spans[0]:
            for columns in spans[1]:
                outline(row[0], rows, columns)
        if len(spans[0]) > 1 or len(spans[1]) > 1:
            for panel in row[1:]:
                placeholder(
                    panel, 'The shift joins this window\nfrom opposite borders of the image.'
                )
            continue
        (top, bottom), (left, right) = spans[0][0], spans[1][0]
        names = ('attention of the chosen point', 'mean attention of all points')
        for panel, share, name in zip(row[1:], shares, names, strict=True):
            values = np.zeros(block.size)
            values[np.ix_(window.rows, window.columns)] = 100 * share
            heat(panel, picture, values, stride, scale, name)
            panel.set(xlim=(left, right), ylim=(bottom, top))
        mark_query(row[1], *query)
        color_bar(figure, row[-1], scale, "% of the window's attention")
    return figure


def _spans(indices: np.ndarray, stride: int) -> list[tuple[float, float]]:
    """Start and end of each run of consecutive rows or columns, in pixels."""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(run[0] * stride, (run[-1] + 1) * stride) for run in np.split(indices, cuts)]


def _window_grid(axes: Axes, picture: np.ndarray, block: Block) -> None:
    side = block.module.window_size * block.stride
    height, width = picture.shape[:2]
    shift = getattr(block.module, 'shift', 0) * block.stride
    for y in range(shift or side, height, side):
        axes.axhline(y, color='white', linewidth=0.6)
    for x in range(shift or side, width, side):
        axes.axvline(x, color='white', linewidth=0.6)
