"""Pictures of QuadTree attention: the patches that a query keeps, from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..attention import attention_maps
from ..capture import Block
from ..quadtree import KeptPatches, kept_patches, looks_across
from .base import (
    color_bar,
    set_title,
    gray,
    heat,
    mark_query,
    outline,
    panels,
    row_title,
    placeholder,
    show,
)

DARK = 0.3


def plot_kept_patches(
    picture: np.ndarray,
    blocks: Sequence[Block],
    query: tuple[float, float],
    model: str,
    head: int | None = None,
    other: tuple[np.ndarray, Sequence[Block]] | None = None,
) -> Figure:
    """What one point of the image keeps at each level, a row for each block.

    Args:
        picture: uint8 RGB (H, W, 3).
        blocks: with QuadTree attention.
        query: (y, x) in pixels of the picture.
        model: name of the model.
        head: whose choice; None takes all heads together.
        other: another picture of that size and its blocks, to look from the first into the second.
    """
    most = max(block.module.num_levels for block in blocks)
    lead = 1 if other else 0
    where = 'in another image' if other else 'in its own image'
    whose = 'all heads together' if head is None else f'head {head}'
    figure, axes = panels(
        len(blocks),
        lead + most + 1,
        picture.shape[:2],
        f'{model}: what the point at y {int(query[0])}, x {int(query[1])} keeps {where}, {whose}',
        'From left to right the pyramid gets finer: only the children of the patches that are kept (white frames; the '
        'brighter, the more probable) are looked at in the next level. Dark: dropped. Star and blue frame: the point '
        'and its own patch. Right: how much attention each place gets in the end, all levels together'
        + (
            '. The weights were learned for one image; keys are of the other here.'
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
        row_title(row[0], f'stage {block.stage}, block {block.index}')
        if other:
            show(row[0], picture, 'the chosen point')
            mark_query(row[0], *query)
        steps = row[lead : lead + most]
        for panel in steps[: most - block.module.num_levels]:
            placeholder(
                panel,
                f'this stage has\n{block.module.num_levels} level{"s" * (block.module.num_levels > 1)}',
            )
        steps = steps[most - block.module.num_levels :]
        for panel, level in zip(steps, levels, strict=False):
            _kept(panel, target, level, block.stride, head)
            if not other:
                _own_patch(panel, level, block.stride)
        _candidates(steps[-1], target, levels, block, head)
        if not other:
            for panel in steps:
                mark_query(panel, *query)
        if other:
            shares = looks_across(block.module, block.inputs[0], token, context)
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
    scores = {}
    for h in heads:
        for patch, score in zip(level.patches[h], level.scores[h], strict=True):
            scores[tuple(patch)] = scores.get(tuple(patch), 0) + score / len(heads)
    most = max(scores.values())
    lit = np.zeros(picture.shape[:2])
    for (row, column), score in scores.items():
        brightness = 0.55 + 0.45 * score / most
        place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        lit[place] = np.maximum(lit[place], brightness)
    _lit(panel, picture, lit)
    for row, column in scores:
        outline(
            panel,
            (row * side, (row + 1) * side),
            (column * side, (column + 1) * side),
            edgecolor='white',
            linewidth=0.5,
            zorder=10,
        )
    share = 100 * sum(scores.values())
    set_title(
        panel,
        f'level {level.level}: {len(scores)} patches of {side} px,\n{share:.0f} % of its attention',
    )


def _own_patch(panel: Axes, level: KeptPatches, stride: int) -> None:
    side = level.cell * stride
    row, column = level.query
    outline(panel, (row * side, (row + 1) * side), (column * side, (column + 1) * side))


def _candidates(
    panel: Axes, picture: np.ndarray, levels: list[KeptPatches], block: Block, head: int | None
) -> None:
    """The finest level looks at all children of what was kept."""
    if not levels or levels[-1].level != 1:
        show(panel, picture, f'level 0: every token of {block.stride} px\nis looked at')
        return
    lit = np.zeros(picture.shape[:2])
    side = levels[-1].cell * block.stride
    heads = range(len(levels[-1].patches)) if head is None else [head]
    for h in heads:
        for row, column in levels[-1].patches[h]:
            lit[row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
    _lit(panel, picture, lit)
    set_title(panel, f'level 0: looks at tokens of {block.stride} px\nin all that was kept')


def _lit(panel: Axes, picture: np.ndarray, brightness: np.ndarray) -> None:
    """The picture, dark and gray where the brightness is 0."""
    share = brightness[..., None]
    show(panel, picture * share + gray(picture) * DARK * (1 - share))


def _same_block(blocks: Sequence[Block], block: Block) -> Block:
    return next(b for b in blocks if (b.stage, b.index) == (block.stage, block.index))
