"""Figures of QuadTree attention: patches that a query keeps, from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..attention import attention_maps
from ..capture import Block
from ..quadtree import KeptPatches, attention_across, kept_patches
from .base import (
    color_bar,
    gray,
    heat,
    mark_query,
    outline,
    panels,
    placeholder,
    row_title,
    set_title,
    show,
)

DARK = 0.3  # brightness of dropped patches


def plot_kept_patches(
    picture: np.ndarray,
    blocks: Sequence[Block],
    query: tuple[float, float],
    model: str,
    head: int | None = None,
    other: tuple[np.ndarray, Sequence[Block]] | None = None,
) -> Figure:
    """Patches that one point of the image keeps at each level, a row for each block.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: blocks with QuadTree attention, one row each.
        query: (y, x) in pixels of the picture.
        model: name of the model.
        head: the head to show; None takes all heads together.
        other: another picture of the same size and its blocks, for attention from the first to it.
    """
    most = max(block.module.num_levels for block in blocks)
    lead = 1 if other else 0
    where = 'in another image' if other else 'in its image'
    whose = 'all heads together' if head is None else f'head {head}'
    figure, axes = panels(
        len(blocks),
        lead + most + 1,
        picture.shape[:2],
        f'{model}: patches that the point at y {int(query[0])}, x {int(query[1])} keeps {where}, '
        f'{whose}',
        'Levels from coarse to fine: the next level attends only to the children of the kept '
        'patches (white frames; the brighter, the more probable). Dark: dropped. Star and blue '
        'frame: the point and its patch. Right: attention to each token, summed over the levels'
        + (
            '. The weights were trained within one image; here keys are from another.'
            if other
            else '.'
        ),
        lines=2,
    )
    target = other[0] if other else picture
    for row, block in zip(axes, blocks, strict=True):
        token = block.token(*query)
        context = _same_block(other[1], block).inputs[0] if other else None
        levels = kept_patches(block.module, block.inputs[0], token, context)
        num_levels = block.module.num_levels
        row_title(row[0], f'stage {block.stage}, block {block.index}')
        if other:
            show(row[0], picture, 'the chosen point')
            mark_query(row[0], *query)
        steps = row[lead : lead + most]
        for panel in steps[: most - num_levels]:
            placeholder(panel, f'this stage has\n{num_levels} level{"s" * (num_levels > 1)}')
        steps = steps[most - num_levels :]
        for panel, level in zip(steps, levels, strict=False):
            _kept(panel, target, level, block.stride, head)
            if not other:
                _query_patch(panel, level, block.stride)
        _candidates(steps[-1], target, levels, block, head)
        if not other:
            for panel in steps:
                mark_query(panel, *query)
        if context is not None:
            shares = attention_across(block.module, block.inputs[0], token, context)
        else:
            shares = attention_maps(block, [token])[0]
        share = 100 * (shares.mean(0) if head is None else shares[head])
        scale = Normalize(0, share.max())
        heat(row[-1], target, share, block.stride, scale, 'attention')
        if not other:
            mark_query(row[-1], *query)
        color_bar(figure, row[-1], scale, '% of the attention')
    return figure


def _kept(
    panel: Axes, picture: np.ndarray, level: KeptPatches, stride: int, head: int | None
) -> None:
    side = level.cell * stride
    heads = range(len(level.patches)) if head is None else [head]
    scores: dict[tuple[int, int], float] = {}
    for h in heads:
        for patch, score in zip(level.patches[h], level.scores[h], strict=True):
            row, column = patch
            scores[row, column] = scores.get((row, column), 0) + score / len(heads)
    most = max(scores.values())
    lit = np.zeros(picture.shape[:2])
    for (row, column), score in scores.items():
        brightness = 0.55 + 0.45 * score / most
        patch = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        lit[patch] = np.maximum(lit[patch], brightness)
    _lit(panel, picture, lit)
    for row, column in scores:
        outline(
            panel,
            (row * side, (row + 1) * side),
            (column * side, (column + 1) * side),
            color='white',
            linewidth=0.5,
            zorder=10,
        )
    share = 100 * sum(scores.values())
    set_title(
        panel,
        f'level {level.level}: {len(scores)} patches of {side} px,\n{share:.0f} % of its attention',
    )


def _query_patch(panel: Axes, level: KeptPatches, stride: int) -> None:
    side = level.cell * stride
    row, column = level.query
    outline(panel, (row * side, (row + 1) * side), (column * side, (column + 1) * side))


def _candidates(
    panel: Axes, picture: np.ndarray, levels: list[KeptPatches], block: Block, head: int | None
) -> None:
    """Show the tokens that the finest level attends to: all children of the kept patches."""
    if not levels or levels[-1].level != 1:
        show(panel, picture, f'level 0: attends to\nall tokens of {block.stride} px')
        return
    lit = np.zeros(picture.shape[:2])
    side = levels[-1].cell * block.stride
    heads = range(len(levels[-1].patches)) if head is None else [head]
    for h in heads:
        for row, column in levels[-1].patches[h]:
            lit[row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
    _lit(panel, picture, lit)
    set_title(panel, f'level 0: attends to tokens of {block.stride} px\nin all kept patches')


def _lit(panel: Axes, picture: np.ndarray, brightness: np.ndarray) -> None:
    """Show the picture by brightness in [0, 1]; at 0 it is dark and gray."""
    share = brightness[..., None]
    show(panel, picture * share + gray(picture) * DARK * (1 - share))


def _same_block(blocks: Sequence[Block], block: Block) -> Block:
    return next(b for b in blocks if (b.stage, b.index) == (block.stage, block.index))
