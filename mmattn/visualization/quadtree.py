"""QuadTree attention: which patches a query keeps from level to level, in its own image or in another one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.attention import QuadTreeAttention

from .capture import Block


class KeptPatches(NamedTuple):
    """What a query has kept at one level of the pyramid.

    Attributes:
        level: 0 is the finest.
        cell: side of one patch, in tokens of the map.
        query: (row, column) of the query's own patch at this level.
        patches: int64 (heads, K, 2), (row, column) of the kept patches, the most probable first.
        scores: float32 (heads, K), their probabilities at this level (type A: times those of all their ancestors).
    """

    level: int
    cell: int
    query: tuple[int, int]
    patches: np.ndarray
    scores: np.ndarray


def kept_patches(
    attention: QuadTreeAttention,
    query_map: Tensor,
    query: tuple[int, int],
    context_map: Tensor | None = None,
) -> list[KeptPatches]:
    """The patches that one query keeps, coarsest level first; nothing is chosen at the finest one.

    Args:
        attention: of a backbone (``block.module``) or of anybody's network.
        query_map: (1, H, W, C), for instance ``block.inputs[0]``.
        query: (row, column) in tokens of ``query_map``.
        context_map: (1, H', W', C) of the other image in attention between two.
    """
    nobody = torch.zeros(0, dtype=torch.long, device=query_map.device)
    with torch.no_grad():
        kept = attention.details(query_map, context_map, queries=nobody).kept
    levels = []
    for i, keys in enumerate(kept):
        level = attention.num_levels - 1 - i
        own = tuple(place // 2**level for place in query)
        token = own[0] * keys.query_size[1] + own[1]
        indices = keys.indices[0, token].T.cpu().numpy()
        patches = np.stack(np.divmod(indices, keys.key_size[1]), -1)
        scores = keys.scores[0, token].T.float().cpu().numpy()
        levels.append(KeptPatches(level, 2**level, own, patches, scores))
    return levels


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Row-major queries (n,) -> their attention to all tokens, (n, heads, H, W), over all levels."""
    levels = block.module.details(*block.inputs, queries=tokens).weights
    return spread(levels, block.size)[0].transpose(0, 1)


def looks_across(
    attention: QuadTreeAttention, query_map: Tensor, query: tuple[int, int], context_map: Tensor
) -> np.ndarray:
    """The attention of one query to all tokens of another image, float32 (heads, H', W').

    Args:
        attention, query_map, query, context_map: as for :func:`kept_patches`.
    """
    token = torch.tensor([query[0] * query_map.shape[2] + query[1]], device=query_map.device)
    levels = attention.details(query_map, context_map, queries=token).weights
    return spread(levels, context_map.shape[1:3])[0, :, 0].float().cpu().numpy()


def spread(levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Levels' attention, coarsest first -> of all together to the tokens of a map, (B, heads, n, *size)."""
    total = 0
    for i, level in enumerate(levels):
        cell = 2 ** (len(levels) - 1 - i)
        fine = F.interpolate(level.flatten(0, 1), scale_factor=cell, mode='nearest') / cell**2
        total = total + fine
    return total.unflatten(0, levels[0].shape[:2])[..., : size[0], : size[1]]
