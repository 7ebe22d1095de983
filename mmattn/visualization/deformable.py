"""Deformable attention of DAT and DAT++: sampling points and the samples with most attention.

Each group of channels has its sampling positions, and a head's position bias is that of its group.
The projections to keys and values mix the samples of all groups. As in the papers' figures, a head
is shown at the positions of its group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .capture import Block, tokens_of


class SamplingPoints(NamedTuple):
    """Sampling points of a block, (x, y) in pixels of the image.

    Attributes:
        references: float32 (H_k, W_k, 2), the regular grid before the offsets.
        positions: float32 (G, H_k, W_k, 2), sampled points of each group of heads.
    """

    references: np.ndarray
    positions: np.ndarray


class TopKeys(NamedTuple):
    """Samples with the highest attention of one query.

    Attributes:
        points: float32 (heads, K, 2), (x, y) in pixels.
        weights: float32 (heads, K), highest first; over all samples of a head they sum to 1.
    """

    points: np.ndarray
    weights: np.ndarray


def sampling_points(block: Block) -> SamplingPoints:
    """Points at which a block with deformable attention samples keys and values."""
    with torch.no_grad():
        no_queries = torch.zeros(0, dtype=torch.long, device=block.inputs[0].device)
        details = block.module.details(*block.inputs, queries=no_queries)
    positions = _to_pixels(block, details.positions)[0]
    return SamplingPoints(_to_pixels(block, details.references), positions)


def top_keys(block: Block, query: tuple[int, int], num: int = 25) -> TopKeys:
    """Samples with the highest attention of a query, for each head.

    Args:
        block: from :func:`mmattn.visualization.capture`, with deformable attention.
        query: (row, column) in tokens.
        num: upper limit of K, the number of samples.

    Raises:
        ValueError: the query is outside the map.
    """
    with torch.no_grad():
        details = block.module.details(*block.inputs, queries=tokens_of(block, [query]))
    weights = details.weights[0, :, 0].flatten(1)  # (heads, Nk)
    weights, keys = weights.topk(min(num, weights.shape[1]))
    points = torch.from_numpy(_to_pixels(block, details.positions))[0].flatten(1, 2)
    # Heads of a group are neighbors.
    points = points.repeat_interleave(len(weights) // len(points), 0)
    points = points.gather(1, keys.cpu().unsqueeze(2).expand(-1, -1, 2))
    return TopKeys(points.numpy(), weights.float().cpu().numpy())


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Attention of row-major queries (n,) to all tokens, (n, heads, H, W).

    The attention to a sample is divided among the four tokens around it.
    """
    details = block.module.details(*block.inputs, queries=tokens)
    weights = details.weights[0].flatten(2).transpose(0, 1)  # (n, heads, Nk)
    n, heads, _ = weights.shape
    positions = details.positions[0].flatten(1, 2)  # (G, Nk, 2)
    positions = positions.repeat_interleave(heads // len(positions), 0)
    height, width = block.size
    limits = positions.new_tensor([height - 1, width - 1])
    positions = (positions + 1) / 2 * limits  # in tokens, (heads, Nk, 2)
    corner = positions.floor()
    out = weights.new_zeros(n, heads, height * width)
    for dy in (0, 1):
        for dx in (0, 1):
            cell = corner + corner.new_tensor([dy, dx])
            share = (1 - (positions - cell).abs()).clamp(min=0).prod(-1)
            share = share * ((cell >= 0) & (cell <= limits)).all(-1)  # zero outside
            cell = torch.minimum(cell.clamp(min=0), limits).long()
            index = (cell[..., 0] * width + cell[..., 1]).expand_as(weights)
            out.scatter_add_(2, index, weights * share.to(weights.dtype))
    return out.unflatten(2, block.size)


def _to_pixels(block: Block, positions: Tensor) -> np.ndarray:
    """Convert (y, x) with cell centers of the map from -1 to 1 to (x, y) in pixels; (..., 2)."""
    limits = positions.new_tensor(block.size) - 1
    pixels = ((positions + 1) / 2 * limits + 0.5) * block.stride
    return pixels.flip(-1).float().cpu().numpy()
