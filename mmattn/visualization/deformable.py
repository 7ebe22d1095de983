"""Deformable attention: where DAT and DAT++ sample, and which samples count.

Each group of channels is sampled at positions of its own, and the projections to keys and values then mix them; a
head's position bias is that of its own group. As in the papers' figures, a head is shown where its group sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .capture import Block, tokens_of


class SamplingPoints(NamedTuple):
    """Points of the image, (x, y) in pixels.

    Attributes:
        references: float32 (H_k, W_k, 2), the regular grid.
        positions: float32 (G, H_k, W_k, 2), where each group of heads sampled.
    """

    references: np.ndarray
    positions: np.ndarray


class TopKeys(NamedTuple):
    """The samples with the highest attention of one query.

    Attributes:
        points: float32 (heads, K, 2), (x, y) in pixels.
        weights: float32 (heads, K), highest first; all samples of a head together have 1.
    """

    points: np.ndarray
    weights: np.ndarray


def sampling_points(block: Block) -> SamplingPoints:
    """Where a block's keys and values come from."""
    with torch.no_grad():
        nobody = torch.zeros(0, dtype=torch.long, device=block.inputs[0].device)
        details = block.module.details(*block.inputs, queries=nobody)
    references, positions = (
        _to_pixels(block, details.references),
        _to_pixels(block, details.positions),
    )
    return SamplingPoints(references, positions[0])


def top_keys(block: Block, query: tuple[int, int], num: int = 25) -> TopKeys:
    """The ``num`` samples that a query attends most, for each head; all of them, if there are no more.

    Args:
        block: of :func:`mmattn.visualization.capture`, with deformable attention.
        query: (row, column) in tokens.
        num: K.
    """
    with torch.no_grad():
        details = block.module.details(*block.inputs, queries=tokens_of(block, [query]))
    weights = details.weights[0, :, 0].flatten(1)  # (heads, Nk)
    weights, keys = weights.topk(min(num, weights.shape[1]))
    points = torch.from_numpy(_to_pixels(block, details.positions))[0].flatten(1, 2)
    points = points.repeat_interleave(
        len(weights) // len(points), 0
    )  # heads of a group are neighbours
    points = points.gather(1, keys.cpu().unsqueeze(2).expand(-1, -1, 2))
    return TopKeys(points.numpy(), weights.float().cpu().numpy())


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Row-major queries (n,) -> their attention to all tokens, (n, heads, H, W).

    The attention to a sample is divided among the four tokens around it.
    """
    details = block.module.details(*block.inputs, queries=tokens)
    weights = details.weights[0].flatten(2).transpose(0, 1)  # (n, heads, Nk)
    n, heads, _ = weights.shape
    positions = details.positions[0].flatten(1, 2)  # (G, Nk, 2)
    positions = positions.repeat_interleave(heads // len(positions), 0)
    height, width = block.size
    limits = positions.new_tensor([height - 1, width - 1])
    places = (positions + 1) / 2 * limits  # in tokens, (heads, Nk, 2)
    corner = places.floor()
    out = weights.new_zeros(n, heads, height * width)
    for dy in (0, 1):
        for dx in (0, 1):
            cell = corner + corner.new_tensor([dy, dx])
            share = (1 - (places - cell).abs()).clamp(min=0).prod(-1)
            share = share * ((cell >= 0) & (cell <= limits)).all(-1)  # zeros lie outside
            cell = torch.minimum(cell.clamp(min=0), limits).long()
            index = (cell[..., 0] * width + cell[..., 1]).expand_as(weights)
            out.scatter_add_(2, index, weights * share.to(weights.dtype))
    return out.unflatten(2, block.size)


def _to_pixels(block: Block, positions: Tensor) -> np.ndarray:
    """(..., 2) as (y, x), the map's cells having their centres from -1 to 1 -> (x, y) in pixels of the image."""
    limits = positions.new_tensor(block.size) - 1
    pixels = ((positions + 1) / 2 * limits + 0.5) * block.stride
    return pixels.flip(-1).float().cpu().numpy()
