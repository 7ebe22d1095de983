"""What DAT's ablations put in the place of its sampled table."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedPositionBias(nn.Module):
    """A learned bias for each pair of query cell and key cell, wherever the keys were sampled.

    Args:
        num_heads: heads.
        query_side: side of the map of queries that it is learned for.
        key_side: side of the grid of keys; for other sizes the bias is interpolated.
    """

    def __init__(self, num_heads: int, query_side: int, key_side: int):
        super().__init__()
        self.sides = (query_side, query_side), (key_side, key_side)
        self.bias = nn.Parameter(torch.empty(num_heads, query_side**2, key_side**2))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, query_size: tuple[int, int], key_size: tuple[int, int]) -> Tensor:
        """(1, heads, Nq, Nk)."""
        queries, keys = self.sides
        bias = _resize_rows(self.bias, queries, query_size)
        return _resize_rows(bias.mT, keys, key_size).mT[None]


def _resize_rows(x: Tensor, size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """(heads, h * w, n) -> (heads, h' * w', n), the rows bilinearly interpolated as a map."""
    if not torch.compiler.is_exporting() and tuple(size) == tuple(wanted):
        return x
    image = x.mT.unflatten(2, size)
    resized = F.interpolate(image, size=tuple(wanted), mode='bilinear', align_corners=True)
    return resized.flatten(2).mT


class LogContinuousPositionBias(nn.Module):
    """Swin V2's bias (arXiv 2111.09883, section 3.3): a small MLP on displacements in log space.

    Args:
        num_heads: heads.
        groups: offset groups; their heads share displacements.
        hidden_dim: hidden channels of the MLP.
    """

    def __init__(self, num_heads: int, groups: int, hidden_dim: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_heads // groups, bias=False),
        )

    def forward(self, query_grid: Tensor, key_positions: Tensor) -> Tensor:
        """Queries at (Nq, 2), keys at (B, G, Nk, 2) -> (B, heads, Nq, Nk)."""
        displacement = 4 * (query_grid[:, None] - key_positions[:, :, None])  # -8 to 8 over the map
        logarithmic = displacement.sign() * torch.log1p(displacement.abs()) / math.log(8)
        return self.mlp(logarithmic).permute(0, 1, 4, 2, 3).flatten(1, 2)
