"""QuadTree attention: patches that a query keeps at each level, and its attention to all tokens.

Both within one image and between two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.attention import QuadTreeAttention

from .capture import Block


class KeptPatches(NamedTuple):
    """Patches that a query keeps at one level of the pyramid.

    Attributes:
        level: index of the level; 0 is the finest.
        cell: side of one patch, in tokens of the map.
        query: (row, column) of the patch that contains the query at this level.
        patches: int64 (heads, K, 2), (row, column) of the kept patches, the most probable first.
        scores: float32 (heads, K), their probabilities at this level, in type A times those of all
            ancestors.
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
    """Patches that one query keeps, coarsest level first, without the finest, which keeps none.

    Args:
        attention: module of a backbone (``block.module``) or of any other network.
        query_map: (1, H, W, C), for instance ``block.inputs[0]``.
        query: (row, column) in tokens of ``query_map``.
        context_map: (1, H', W', C), the map of the other image for attention between two images.
    """
    no_queries = torch.zeros(0, dtype=torch.long, device=query_map.device)
    with torch.no_grad():
        kept = attention.details(query_map, context_map, queries=no_queries).kept
    levels = []
    for i, keys in enumerate(kept):
        level = attention.num_levels - 1 - i
        patch = query[0] // 2**level, query[1] // 2**level
        token = patch[0] * keys.query_size[1] + patch[1]
        indices = keys.indices[0, token].T.cpu().numpy()
        patches = np.stack(np.divmod(indices, keys.key_size[1]), -1)
        scores = keys.scores[0, token].T.float().cpu().numpy()
        levels.append(KeptPatches(level, 2**level, patch, patches, scores))
    return levels


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Attention of row-major queries (n,) to all tokens, (n, heads, H, W), summed over levels."""
    levels = block.module.details(*block.inputs, queries=tokens).weights
    return _to_finest(levels, block.size)[0].transpose(0, 1)


def attention_across(
    attention: QuadTreeAttention, query_map: Tensor, query: tuple[int, int], context_map: Tensor
) -> np.ndarray:
    """Attention of one query to all tokens of another image, float32 (heads, H', W').

    Args:
        attention, query_map, query, context_map: as in :func:`kept_patches`.
    """
    token = torch.tensor([query[0] * query_map.shape[2] + query[1]], device=query_map.device)
    levels = attention.details(query_map, context_map, queries=token).weights
    return (
        _to_finest(levels, (context_map.shape[1], context_map.shape[2]))[0, :, 0]
        .float()
        .cpu()
        .numpy()
    )


def _to_finest(levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Sum of the attention of all levels, coarsest first, at the finest: (B, heads, n, *size)."""
    total = levels[0].new_zeros(())
    for i, level in enumerate(levels):
        cell = 2 ** (len(levels) - 1 - i)
        fine = F.interpolate(level.flatten(0, 1), scale_factor=cell, mode='nearest') / cell**2
        total = total + fine
    return total.unflatten(0, levels[0].shape[:2])[..., : size[0], : size[1]]
