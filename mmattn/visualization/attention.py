"""Attention of single tokens to all tokens of their map, for every mechanism."""

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
    """Attention of some tokens to every token of their map.

    The attention to a deformable sample is divided among the four tokens around it, with the
    weights of the bilinear interpolation. A coarse patch of a QuadTree passes its attention to all
    tokens that it was pooled from. Attention that falls outside the map (a window's padding) is
    dropped, so the shares of a query sum to 1 or slightly less; in type A of QuadTree, to what
    remains at the finest levels.

    Args:
        block: from :func:`mmattn.visualization.capture`.
        queries: (n, 2), (row, column) in tokens; :meth:`Block.token` converts from pixels.

    Returns:
        float32 (n, heads, H, W).

    Raises:
        ValueError: a query is outside the map.
    """
    tokens = tokens_of(block, queries)
    with torch.no_grad():
        return _TO_TOKENS[block.kind](block, tokens).float().cpu().numpy()
