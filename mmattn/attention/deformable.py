"""Deformable attention (DAT, arXiv 2201.00520, section 3.2; DAT++, arXiv 2309.01430)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmattn.layers import channel_last
from mmattn.ops import at_least, deform_sample

from .details import DeformableDetails
from .heads import check_heads, select_queries
from .position_bias import QueryGrid, build_position_bias


class OffsetNetwork(nn.Module):
    """Offsets of the sampling points from the queries, one network for all groups.

    Args:
        dim: channels of a group.
        kernel_size: of the depthwise convolution.
        stride: of the grid of sampling points.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int):
        super().__init__()
        padding = 0 if kernel_size == stride else kernel_size // 2
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, stride, padding, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """(N, H, W, dim) -> (N, H_k, W_k, 2), as (y, x)."""
        return self.proj(self.act(self.norm(channel_last(self.dwconv, q))))


class DeformableAttention(nn.Module):
    """Multi-head attention to keys that are sampled at learned points of the map.

    A network on the queries gives each reference point of a regular grid an offset, for each of
    ``groups`` groups of channels; keys and values are projected from the map sampled there. The
    bias is a table sampled at the displacement of query and key, so that maps may have any size.
    Offsets, positions and bilinear weights are float32 under autocast, too.

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        groups: groups of channels, and of heads, each with its own offsets.
        table_size: side S of the map for which the bias has one entry for each displacement; the
            table has 2S - 1 a side.
        stride: of the grid of reference points.
        kernel_size: of the offset network's depthwise convolution.
        offset_range: offsets are ``tanh(offset) * offset_range`` steps of the grid; None leaves
            them unbounded.
        plus_plus: DAT++'s conventions for coordinates: grids reach from -1 to 1 in n - 1 steps
            instead of n, and positions without an offset range are clamped to the map.
        offsets: False samples at the reference points (an ablation).
        position_bias: 'table', or in the ablations 'fixed', 'log_cpb', 'depthwise', 'none'.

    Raises:
        ValueError: dim, num_heads and groups are no multiples of each other, or an argument is
            out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        table_size: int,
        stride: int = 1,
        kernel_size: int = 3,
        offset_range: float | None = 2.0,
        plus_plus: bool = False,
        offsets: bool = True,
        position_bias: str = 'table',
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if groups < 1 or num_heads % groups:
            raise ValueError(
                f'num_heads must be a multiple of groups, '
                f'got num_heads {num_heads} and groups {groups}'
            )
        for name, value in dict(
            table_size=table_size, stride=stride, kernel_size=kernel_size
        ).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.groups = groups
        self.group_dim = dim // groups
        self.stride = stride
        self.offset_range = offset_range
        self.plus_plus = plus_plus
        self.offsets = OffsetNetwork(dim // groups, kernel_size, stride) if offsets else None
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.position_bias = build_position_bias(
            position_bias, dim, num_heads, groups, table_size, stride
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        q, k, v, positions, _ = self.project(x)
        out = self.position_bias(q, k, v, self.query_grid(x, positions), positions)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def details(self, x: Tensor, queries: Tensor | None = None) -> DeformableDetails:
        """Attention of :meth:`forward` for the same map; ``queries`` as in :mod:`.details`.

        Costs the attention matrix of the queries.
        """
        q, k, _, positions, references = self.project(x)
        tokens = select_queries(queries, x.shape[1] * x.shape[2], x.device)
        size, points, _ = self.query_grid(x, positions)
        bias = self.position_bias.bias(QueryGrid(size, points[tokens], tokens), positions)
        scores = q[:, :, tokens] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(-1).unflatten(3, positions.shape[2:4])
        return DeformableDetails(weights, positions, references)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Project and sample a map (B, H, W, C).

        Returns:
            Queries (B, heads, H * W, d), keys and values (B, heads, H_k * W_k, d), sampled points
            (B, G, H_k, W_k, 2) and reference points (H_k, W_k, 2).
        """
        q = self.q_proj(x)
        positions, references = self.sampling_points(q)
        sampled = deform_sample(x.permute(0, 3, 1, 2), positions.flatten(2, 3)).transpose(1, 2)
        q, k, v = (
            tokens.reshape(*tokens.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for tokens in (q.flatten(1, 2), self.k_proj(sampled), self.v_proj(sampled))
        )
        return q, k, v, positions, references

    def sampling_points(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, W, C) -> sampled points (B, G, H_k, W_k, 2), references (H_k, W_k, 2)."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        if self.offsets is None:
            size = [(side - 1) // self.stride + 1 for side in q.shape[1:3]]
            references = self._grid(size, 0.5, q.device, dtype)
            return references.expand(q.shape[0], self.groups, *references.shape), references
        groups = q.reshape(*q.shape[:3], self.groups, self.group_dim).movedim(3, 1).flatten(0, 1)
        with _without_autocast(q.device.type):
            offsets = self.offsets(groups.to(self.offsets.dwconv.weight.dtype)).to(dtype)
        size = offsets.shape[1:3]
        references = self._grid(size, 0.5, q.device, dtype)
        if self.offset_range is not None:
            ranges = (self.offset_range / self._steps(side) for side in size)
            along = offsets.tanh().unbind(-1)
            offsets = torch.stack([o * r for o, r in zip(along, ranges, strict=True)], -1)
        positions = references + offsets.reshape(q.shape[0], self.groups, *offsets.shape[1:])
        if self.plus_plus and self.offset_range is None:
            positions = positions.clamp(-1, 1)
        return positions, references

    def query_grid(self, x: Tensor, positions: Tensor) -> QueryGrid:
        """Positions of the tokens of a map (B, H, W, C)."""
        first = 0.0 if self.plus_plus else 0.5
        grid = self._grid(x.shape[1:3], first, positions.device, positions.dtype)
        return QueryGrid((x.shape[1], x.shape[2]), grid.flatten(0, 1))

    def _grid(
        self, size: Sequence[int], first: float, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """(y, x) of a regular grid in [-1, 1], (*size, 2), starting ``first`` steps from -1."""
        axes = (
            (torch.arange(side, device=device, dtype=dtype) + first) / self._steps(side) * 2 - 1
            for side in size
        )
        return torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1)

    def _steps(self, side: int) -> int:
        """Number of steps into which ``side`` points divide [-1, 1]."""
        return at_least(side - 1, 1) if self.plus_plus else side


def _without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast; devices that have none, such as meta, need nothing."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
