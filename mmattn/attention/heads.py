"""Checks and selections shared by the attention modules."""

from __future__ import annotations

import torch
from torch import Tensor


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless ``num_heads`` divides ``dim``."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f'dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}'
        )


def select_queries(queries: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Row-major token indices int64 (n,) on the device: the given ones, or all ``count``."""
    if queries is None:
        return torch.arange(count, device=device)
    return torch.as_tensor(queries, dtype=torch.long, device=device)
