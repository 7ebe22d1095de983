"""Attention of window and neighborhood attention to the tokens of the map."""

from __future__ import annotations

from torch import Tensor

from .capture import Block
from .windows import window_details


def attention_to_tokens(block: Block, tokens: Tensor) -> Tensor:
    """Attention of row-major queries (n,) to all tokens, (n, heads, H, W)."""
    weights, keys = window_details(block, tokens)
    weights = weights[0].transpose(0, 1)  # (n, heads, N)
    count = block.size[0] * block.size[1]
    # Padding is collected at one extra index after the map.
    index = keys.where(keys >= 0, count).unsqueeze(1).expand_as(weights)
    out = weights.new_zeros(*weights.shape[:2], count + 1).scatter_(2, index, weights)
    return out[..., :-1].unflatten(2, block.size)
