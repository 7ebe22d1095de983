"""Deformable attention (DAT, arXiv 2201.00520, section 3.2; DAT++, arXiv 2309.01430) as a module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.layers import ChannelNorm
from mmattn.ops import deform_attention, deform_bias, deform_sample

from .position_bias import FixedPositionBias, LogContinuousPositionBias

POSITION_BIASES = ('table', 'fixed', 'log_cpb', 'depthwise', 'none')


class DeformableAttentionDetails(NamedTuple):
    """What deformable attention looked at.

    Attributes:
        positions: (B, G, H_k, W_k, 2), where keys and values were sampled, as (y, x); the map's
            cells have their centres from -1 to 1.
        references: (H_k, W_k, 2), the same before the offsets.
        weights: (B, heads, H, W, H_k, W_k), the attention of each query to each sample; of n chosen
            queries (B, heads, n, H_k, W_k).
    """

    positions: Tensor
    references: Tensor
    weights: Tensor


class DeformableAttention(nn.Module):
    """Multi-head attention to keys sampled at points of the map that are learned from it.

    A network on the queries gives each reference point of a regular grid an offset, for each of
    ``groups`` groups of channels; keys and values are projected from the map sampled there. The
    bias is a table sampled at the displacement of query and key, so that maps may have any size.
    Offsets, positions and bilinear weights are float32 under autocast, too.

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        groups: groups of channels, and of heads, with offsets of their own.
        table_size: side S of the map for which the bias has one entry for each displacement; the
            table has 2S - 1 a side.
        stride: of the grid of reference points.
        kernel_size: of the offset network's depthwise convolution.
        offset_range: offsets are ``tanh(offset) * offset_range`` steps of the grid; None leaves
            them as they are.
        plus_plus: DAT++'s conventions for the coordinates: grids reach from -1 to 1 by n - 1
            steps instead of n, and positions without an offset range are clamped to the map.
        offsets: False samples at the reference points (an ablation).
        position_bias: 'table', or in the ablations 'fixed', 'log_cpb', 'depthwise' (a depthwise
            convolution of the queries, added to the output) and 'none'.

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
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f'dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}'
            )
        if groups < 1 or num_heads % groups:
            raise ValueError(
                f'num_heads must be a multiple of groups, got num_heads {num_heads} and groups {groups}'
            )
        for name, value in dict(
            table_size=table_size, stride=stride, kernel_size=kernel_size
        ).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if position_bias not in POSITION_BIASES:
            choices = ', '.join(POSITION_BIASES)
            raise ValueError(f'position_bias must be one of {choices}, got {position_bias!r}')
        self.num_heads = num_heads
        self.groups = groups
        self.scale = (dim // num_heads) ** -0.5
        self.stride = stride
        self.offset_range = offset_range
        self.plus_plus = plus_plus
        group_dim = dim // groups
        padding = 0 if kernel_size == stride else kernel_size // 2
        self.conv_offset = nn.Sequential(
            nn.Conv2d(group_dim, group_dim, kernel_size, stride, padding, groups=group_dim),
            ChannelNorm(group_dim),
            nn.GELU(),
            nn.Conv2d(group_dim, 2, 1, bias=False),
        )
        if not offsets:
            self.conv_offset = None
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (
            nn.Conv2d(dim, dim, 1) for _ in range(4)
        )
        self.position_bias = position_bias
        if position_bias == 'table':
            side = 2 * table_size - 1
            self.rpe_table = nn.Parameter(torch.empty(num_heads, side, side))
            nn.init.trunc_normal_(self.rpe_table, std=0.02)
        elif position_bias == 'fixed':
            key_side = (table_size - 1) // stride + 1
            self.rpe_table = FixedPositionBias(num_heads, table_size, key_side)
        elif position_bias == 'log_cpb':
            self.rpe_table = LogContinuousPositionBias(num_heads, groups)
        elif position_bias == 'depthwise':
            self.rpe_table = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), channel-last."""
        q, k, v, positions, _ = self._project(x)
        if self.position_bias == 'table':
            grid, flat = self._query_grid(*x.shape[1:3], positions), positions.flatten(2, 3)
            out = deform_attention(q, k, v, self.rpe_table, grid, flat, self.scale)
        else:
            bias = self._bias(x.shape[1:3], positions)
            bias = None if bias is None else bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = self._as_map(out, x)
        if self.position_bias == 'depthwise':
            out = out + self.rpe_table(self._as_map(q, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _pointwise(self.proj_out, out)

    def details(self, x: Tensor, queries: Tensor | None = None) -> DeformableAttentionDetails:
        """What :meth:`forward` looks at for the same map, at the cost of the whole attention matrix.

        ``queries``: row-major indices of some of the map's tokens, int64 (n,); only their attention is computed.
        """
        q, k, _, positions, references = self._project(x)
        bias = self._bias(x.shape[1:3], positions, queries)
        if queries is not None:
            q = q[:, :, queries]
        scores = self.scale * q @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        weights = weights.unflatten(3, positions.shape[2:4])
        if queries is None:
            weights = weights.unflatten(2, x.shape[1:3])
        return DeformableAttentionDetails(positions, references, weights)

    def _bias(
        self, query_size: Sequence[int], positions: Tensor, queries: Tensor | None = None
    ) -> Tensor | None:
        """What is added to the scores, (B or 1, heads, Nq, Nk), if anything is; of all queries, or of chosen ones."""
        chosen = slice(None) if queries is None else queries
        if self.position_bias == 'fixed':
            return self.rpe_table(query_size, positions.shape[2:4])[:, :, chosen]
        grid, flat = self._query_grid(*query_size, positions)[chosen], positions.flatten(2, 3)
        if self.position_bias == 'table':
            return deform_bias(self.rpe_table, grid, flat)
        return self.rpe_table(grid, flat) if self.position_bias == 'log_cpb' else None

    @staticmethod
    def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
        """(B, heads, HW, d) -> (B, H, W, C) for a map ``like`` (B, H, W, C)."""
        return tokens.transpose(1, 2).reshape(like.shape)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, heads, HW, d), keys and values (B, heads, H_k W_k, d), positions, references."""
        q = _pointwise(self.proj_q, x)
        positions, references = self._positions(q.permute(0, 3, 1, 2))
        sampled = deform_sample(x.permute(0, 3, 1, 2), positions.flatten(2, 3)).transpose(1, 2)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (
                q.flatten(1, 2),
                _pointwise(self.proj_k, sampled),
                _pointwise(self.proj_v, sampled),
            )
        )
        return q, k, v, positions, references

    def _positions(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling positions (B, G, H_k, W_k, 2) and references (H_k, W_k, 2) from queries (B, C, H, W)."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        if self.conv_offset is None:
            size = [(side - 1) // self.stride + 1 for side in q.shape[2:]]
            references = self._grid(size, 0.5, q.device, dtype)
            return references.expand(q.shape[0], self.groups, *references.shape), references
        with _without_autocast(q.device.type):
            groups = q.unflatten(1, (self.groups, -1)).flatten(0, 1)
            offsets = self.conv_offset(groups.to(self.conv_offset[0].weight.dtype))
        offsets = offsets.permute(0, 2, 3, 1).to(dtype)
        size = offsets.shape[1:3]
        references = self._grid(size, 0.5, q.device, dtype)
        if self.offset_range is not None:
            ranges = (self.offset_range / self._steps(side) for side in size)
            offsets = offsets.tanh().unbind(-1)
            offsets = torch.stack([o * r for o, r in zip(offsets, ranges, strict=True)], -1)
        positions = references + offsets.unflatten(0, (-1, self.groups))
        if self.plus_plus and self.offset_range is None:
            positions = positions.clamp(-1, 1)
        return positions, references

    def _query_grid(self, height: int, width: int, positions: Tensor) -> Tensor:
        """Where the queries stand, (H * W, 2)."""
        first = 0.0 if self.plus_plus else 0.5
        return self._grid((height, width), first, positions.device, positions.dtype).flatten(0, 1)

    def _grid(
        self, size: Sequence[int], first: float, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """(y, x) of a regular grid in [-1, 1], (*size, 2), its first point ``first`` steps from -1."""
        axes = (
            (torch.arange(side, device=device, dtype=dtype) + first) / self._steps(side) * 2 - 1
            for side in size
        )
        return torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1)

    def _steps(self, side: int) -> int:
        """Into how many steps a side of that many points is divided from -1 to 1."""
        return torch.sym_max(side - 1, 1) if self.plus_plus else side


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of a channel-last map (..., C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _without_autocast(device_type: str):
    """A context without autocast, also on devices that have none, such as meta."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
