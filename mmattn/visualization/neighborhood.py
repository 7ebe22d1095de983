"""DAT++'s neighbourhood attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .capture import Block


def looks(block: Block, tokens: Tensor) -> Tensor:
    """Row-major queries (n,) -> their attention to all tokens, (n, heads, H, W)."""
    kernel = block.module.kernel_size
    shares = block.module.weights(*block.inputs)[0].flatten(0, 1)[tokens]  # (n, heads, k*k)
    # A map smaller than the kernel is completed at the right and at the bottom.
    padded = [max(side, kernel) for side in block.size]
    rows, columns = (
        (place - kernel // 2).clamp(0, side - kernel)[:, None]
        + torch.arange(kernel, device=tokens.device)
        for place, side in zip(
            (tokens // block.size[1], tokens % block.size[1]), padded, strict=True
        )
    )
    keys = (rows[:, :, None] * padded[1] + columns[:, None]).flatten(1)
    out = shares.new_zeros(*shares.shape[:2], padded[0] * padded[1])
    out.scatter_(2, keys.unsqueeze(1).expand_as(shares), shares)
    return out.unflatten(2, padded)[..., : block.size[0], : block.size[1]]
