"""Position biases of deformable attention: the papers' sampled table and its ablations.

Each attends with its own bias: ``forward(q, k, v, queries, positions)`` takes queries, keys and
values (B, heads, N, d), the :class:`QueryGrid` and the sampled points (B, G, H_k, W_k, 2), and
returns (B, heads, Nq, d). ``bias(queries, positions)`` gives what is added to the scores,
(B or 1, heads, Nq, Nk), or None.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.ops import deform_attention, deform_bias, recording


class QueryGrid(NamedTuple):
    """Positions of the queries.

    Attributes:
        size: rows and columns of the map.
        points: (Nq, 2), (y, x) of its tokens, or of chosen ones.
        tokens: row-major indices of the chosen ones.
    """

    size: tuple[int, int]
    points: Tensor
    tokens: Tensor | slice = slice(None)


class NoBias(nn.Module):
    """Attention without a position bias."""

    def bias(self, queries: QueryGrid, positions: Tensor) -> Tensor | None:
        """Bias of the scores: none."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: QueryGrid, positions: Tensor
    ) -> Tensor:
        """Attend with the whole bias in memory."""
        bias = self.bias(queries, positions)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)
        )


class TableBias(NoBias):
    """Table of displacements, read bilinearly (DAT, section 3.2): maps may have any size.

    Args:
        num_heads: heads.
        table_size: side S of the map for which the table has one entry for each displacement.
    """

    def __init__(self, num_heads: int, table_size: int):
        super().__init__()
        side = 2 * table_size - 1
        self.table = nn.Parameter(torch.empty(num_heads, side, side))
        nn.init.trunc_normal_(self.table, std=0.02)

    def bias(self, queries: QueryGrid, positions: Tensor) -> Tensor:
        """(B, heads, Nq, Nk)."""
        return deform_bias(self.table, queries.points, positions.flatten(2, 3))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: QueryGrid, positions: Tensor
    ) -> Tensor:
        """Attend; nothing of the size of the scores reaches memory."""
        scale = q.shape[-1] ** -0.5
        points = positions.flatten(2, 3)
        return deform_attention(q, k, v, self.table, queries.points, points, scale)


class FixedBias(NoBias):
    """Learned bias for each pair of query cell and key cell, wherever the keys were sampled.

    Args:
        num_heads: heads.
        query_side: side of the map of queries that it is learned for.
        key_side: side of the grid of keys; for other sizes the bias is interpolated.
    """

    def __init__(self, num_heads: int, query_side: int, key_side: int):
        super().__init__()
        self.sides = (query_side, query_side), (key_side, key_side)
        self.pairs = nn.Parameter(torch.empty(num_heads, query_side**2, key_side**2))
        nn.init.trunc_normal_(self.pairs, std=0.02)

    def bias(self, queries: QueryGrid, positions: Tensor) -> Tensor:
        """(1, heads, Nq, Nk)."""
        query_side, key_side = self.sides
        bias = _resize_rows(self.pairs, query_side, queries.size)
        bias = _resize_rows(bias.mT, key_side, positions.shape[2:4]).mT[None]
        return bias[:, :, queries.tokens]


def _resize_rows(x: Tensor, size: tuple[int, int], wanted: tuple[int, ...]) -> Tensor:
    """(heads, h * w, n) -> (heads, h' * w', n), rows interpolated bilinearly as a map."""
    if not recording() and tuple(size) == tuple(wanted):
        return x
    image = x.mT.reshape(x.shape[0], x.shape[2], *size)
    resized = F.interpolate(image, size=tuple(wanted), mode='bilinear', align_corners=True)
    return resized.flatten(2).mT


class LogContinuousBias(NoBias):
    """Small MLP on displacements in log space (Swin V2, arXiv 2111.09883, section 3.3).

    Args:
        num_heads: heads.
        groups: offset groups; the heads of a group share displacements.
        hidden_dim: hidden channels of the MLP.
    """

    def __init__(self, num_heads: int, groups: int, hidden_dim: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_heads // groups, bias=False),
        )

    def bias(self, queries: QueryGrid, positions: Tensor) -> Tensor:
        """(B, heads, Nq, Nk)."""
        keys = positions.flatten(2, 3)[:, :, None]
        displacement = 4 * (queries.points[:, None] - keys)  # -8 to 8 over the map
        logarithmic = displacement.sign() * torch.log1p(displacement.abs()) / math.log(8)
        logarithmic = logarithmic.to(next(self.mlp.parameters()).dtype)
        return self.mlp(logarithmic).permute(0, 1, 4, 2, 3).flatten(1, 2)


class DepthwiseBias(NoBias):
    """No bias of the scores; a depthwise convolution of the queries is added to the output.

    Args:
        dim: channels of all heads.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: QueryGrid, positions: Tensor
    ) -> Tensor:
        """Attend, and add the convolution."""
        channels_first = q.transpose(2, 3)
        convolved = self.conv(channels_first.flatten(1, 2).reshape(len(q), -1, *queries.size))
        convolved = convolved.reshape(channels_first.shape).transpose(2, 3)
        return super().forward(q, k, v, queries, positions) + convolved


POSITION_BIASES = ('table', 'fixed', 'log_cpb', 'depthwise', 'none')


def build_position_bias(
    name: str, dim: int, num_heads: int, groups: int, table_size: int, stride: int
) -> NoBias:
    """Position bias by its name in :data:`POSITION_BIASES`.

    Raises:
        ValueError: there is none of that name.
    """
    if name == 'table':
        return TableBias(num_heads, table_size)
    if name == 'fixed':
        return FixedBias(num_heads, table_size, (table_size - 1) // stride + 1)
    if name == 'log_cpb':
        return LogContinuousBias(num_heads, groups)
    if name == 'depthwise':
        return DepthwiseBias(dim)
    if name == 'none':
        return NoBias()
    raise ValueError(f'position_bias must be one of {", ".join(POSITION_BIASES)}, got {name!r}')
