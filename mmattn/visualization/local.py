"""Attention to a window of the map, for windows and neighborhoods alike."""

from __future__ import annotations

from torch import Tensor

from .capture import Block
from .windows import window_details


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Row-major queries (n,) -> their attention to all tokens, (n, heads, H, W)."""
    weights, keys = window_details(block, tokens)
    weights = weights[0].transpose(0, 1)  # (n, heads, N)
    count = block.size[0] * block.size[1]
    # The padding is collected in one place behind the map.
    index = keys.where(keys >= 0, count).unsqueeze(1).expand_as(weights)
    out = weights.new_zeros(*weights.shape[:2], count + 1).scatter_(2, index, weights)
    return out[..., :-1].unflatten(2, block.size)
