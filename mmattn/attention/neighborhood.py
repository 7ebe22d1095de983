"""Neighborhood attention (NAT, arXiv 2204.07143) as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.ops import (
    at_least,
    neighborhood_attention,
    neighborhood_attention_weights,
    recording,
)

from .details import LocalDetails
from .heads import check_heads, select_queries


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of each token to its kernel_size x kernel_size nearest tokens.

    Maps of any size: one smaller than the kernel is completed with zero tokens, which take part in
    attention without a mask (their key and value are the projection's bias).

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        kernel_size: odd side of the neighborhood in tokens.

    Raises:
        ValueError: dim is no multiple of num_heads, or kernel_size is not odd and positive.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7):
        super().__init__()
        check_heads(dim, num_heads)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        q, k, v = self.project(x)
        out = neighborhood_attention(q, k, v, self.rpb, self.kernel_size, self.scale)
        return self.proj(out.flatten(-2).narrow(1, 0, height).narrow(2, 0, width))

    def details(self, x: Tensor, queries: Tensor | None = None) -> LocalDetails:
        """Attention of :meth:`forward` for the same map; ``queries`` as in :mod:`.details`."""
        height, width = x.shape[1:3]
        q, k, _ = self.project(x)
        weights = neighborhood_attention_weights(q, k, self.rpb, self.kernel_size, self.scale)
        tokens = select_queries(queries, height * width, x.device)
        weights = weights[:, :height, :width].flatten(1, 2)[:, tokens]  # (B, n, heads, k * k)
        # The window is centered on the query, then moved into the map, padding included.
        rows, columns = (
            (place - self.kernel_size // 2).clamp(0, side - self.kernel_size)[:, None]
            + torch.arange(self.kernel_size, device=x.device)
            for place, side in zip((tokens // width, tokens % width), k.shape[1:3], strict=True)
        )
        keys = rows[:, :, None] * width + columns[:, None]
        inside = (rows < height)[:, :, None] & (columns < width)[:, None]
        return LocalDetails(weights.transpose(1, 2), keys.where(inside, -1).flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values (B, H, W, heads, d) of the map, completed to the kernel's size."""
        bottom, right = (at_least(self.kernel_size - side, 0) for side in x.shape[1:3])
        if recording() or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.qkv(x).reshape(*x.shape[:3], 3, self.num_heads, self.head_dim).unbind(-3)
