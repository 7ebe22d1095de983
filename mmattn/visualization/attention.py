"""Where a token looks: its attention to every token of its map, for any of the mechanisms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import deformable, local, quadtree
from .capture import Block, tokens_of

_TO_TOKENS = {
    'local': local.attention_to_tokens,
    'shifted': local.attention_to_tokens,
    'global': local.attention_to_tokens,
    'neighborhood': local.attention_to_tokens,
    'deformable': deformable.attention_to_tokens,
    'quadtree': quadtree.attention_to_tokens,
}


def attention_maps(block: Block, queries: Sequence[tuple[int, int]] | Tensor) -> np.ndarray:
    """How a block's attention is shared out among the tokens of its map.

    A deformable sample lies between tokens and counts for the four around it, as it was sampled from them. Levels of
    a QuadTree count for all tokens that they were pooled from. What falls outside the map (a window's padding) is
    lost, so the shares add up to 1 or a little less; type A of QuadTree, to what it has left at the finest levels.

    Args:
        block: of :func:`mmattn.visualization.capture`.
        queries: (n, 2), (row, column) in tokens; :meth:`Block.token` gives those of a pixel.

    Returns:
        float32 (n, heads, H, W).

    Raises:
        ValueError: a query is outside the map.
    """
    tokens = tokens_of(block, queries)
    with torch.no_grad():
        return _TO_TOKENS[block.kind](block, tokens).float().cpu().numpy()
