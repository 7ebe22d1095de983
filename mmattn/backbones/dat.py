"""Deformable Attention Transformer: DAT (Xia et al., CVPR 2022, arXiv 2201.00520) and DAT++ (arXiv 2309.01430).

A convolutional stem, then four stages at 1/4 to 1/32 of the image, each a sequence of blocks with
local (L), shifted-window (S), neighbourhood (N) or deformable (D) attention. DAT++ adds
convolutions: an overlapping stem and downsampling, a depthwise one before each block and one in
its MLP. Maps are channel-last, (B, H, W, C), in the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmattn.attention import DeformableAttention, NeighborhoodAttention, WindowAttention
from mmattn.layers import ChannelNorm, Mlp, ScaledResidual

from .base import (
    NUM_STAGES,
    PyramidBackbone,
    channel_last_kernels,
    check_image,
    check_rate,
    drop_path_rates,
    init_linear,
    look_up_arch,
    per_stage,
)


@dataclass(frozen=True)
class DATArch:
    """A row of the papers' tables of variants.

    Attributes:
        dims: channels of each stage.
        blocks: attention of each block of each stage, one letter a block: L, S, N or D.
        num_heads: heads of each stage.
        groups: offset groups of each stage; 0 where no block is D.
        drop_path_rate: of the ImageNet training.
        strides: of each stage's grid of sampling points.
        kernel_sizes: of each stage's offset network.
        plus_plus: DAT++: convolutions in stem, downsampling, blocks and MLP; DAT++'s coordinates.
        offset_range: offsets are at most that many steps of the grid; None: unbounded.
        offsets: False samples on the regular grid.
        position_bias: of D blocks, as in :class:`DeformableAttention`.
    """

    dims: Sequence[int]
    blocks: Sequence[str]
    num_heads: Sequence[int]
    groups: Sequence[int]
    drop_path_rate: float = 0.0
    strides: Sequence[int] = (1, 1, 1, 1)
    kernel_sizes: Sequence[int] = (9, 7, 5, 3)
    plus_plus: bool = False
    offset_range: float | None = 2.0
    offsets: bool = True
    position_bias: str = 'table'


def _plus_plus(dims, num_heads, groups, drop_path_rate) -> DATArch:
    blocks = ('ND', 'ND' * 2, 'ND' * 9, 'DD')
    return DATArch(
        dims,
        blocks,
        num_heads,
        groups,
        drop_path_rate,
        (8, 4, 2, 1),
        plus_plus=True,
        offset_range=None,
    )


_SHALLOW, _DEEP = ('LS', 'LS', 'LD' * 3, 'LD'), ('LS', 'LS', 'LD' * 9, 'LD')

arch_zoo = {
    'tiny': DATArch((96, 192, 384, 768), _SHALLOW, (3, 6, 12, 24), (0, 0, 3, 6), 0.2),
    'small': DATArch((96, 192, 384, 768), _DEEP, (3, 6, 12, 24), (0, 0, 3, 6), 0.3),
    'base': DATArch((128, 256, 512, 1024), _DEEP, (4, 8, 16, 32), (0, 0, 4, 8), 0.5),
    'tiny++': _plus_plus((64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 4, 8), 0.2),
    'small++': _plus_plus((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 3, 6), 0.4),
    'base++': _plus_plus((128, 256, 512, 1024), (4, 8, 16, 32), (2, 4, 8, 16), 0.7),
}

NEIGHBORHOOD = 7


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution of a channel-last map."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvMlp(Mlp):
    """DAT++'s MLP with a depthwise convolution, on (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(dim, hidden_dim)
        self.dwc = DepthwiseConv(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.project(x + self.dwc(x))


class Patchify(nn.Module):
    """DAT's stem and downsampling: the map is padded to whole patches, which become tokens."""

    def __init__(self, in_dim: int, out_dim: int, patch: int, bias: bool):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(in_dim, out_dim, patch, patch, bias=bias)
        self.norm = ChannelNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / patch), ceil(W / patch))."""
        bottom, right = (((side - 1) // self.patch + 1) * self.patch - side for side in x.shape[2:])
        if torch.compiler.is_exporting() or bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.conv(x))


def overlapping_stem(dim: int) -> nn.Sequential:
    """DAT++'s stem, (B, 3, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""
    return nn.Sequential(
        nn.Conv2d(3, dim // 2, 3, 2, 1),
        ChannelNorm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1),
        ChannelNorm(dim),
    )


def dat_block(
    x: Tensor,
    perception: nn.Module | None,
    norm1: nn.Module,
    attention: nn.Module,
    norm2: nn.Module,
    mlp: nn.Module,
    residual: nn.Module,
) -> Tensor:
    """DAT++'s convolution, then norm, attention, residual, norm, MLP, residual, on (B, H, W, C)."""
    if perception is not None:
        x = x + perception(x)
    x = residual(x, attention(norm1(x)))
    return residual(x, mlp(norm2(x)))


class DATStage(nn.Module):
    """The blocks of one resolution; block d is ``attns[d]`` and ``mlps[d]`` with two norms.

    Args:
        dim: channels C.
        attentions: the attention module of each block, on (B, H, W, C).
        drop_path: rate of stochastic depth of each block.
        plus_plus: DAT++'s convolutions.
    """

    def __init__(
        self, dim: int, attentions: list[nn.Module], drop_path: Sequence[float], plus_plus: bool
    ):
        super().__init__()
        depth = len(attentions)
        mlp = ConvMlp if plus_plus else Mlp
        self.layer_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.attns = nn.ModuleList(attentions)
        self.mlps = nn.ModuleList(mlp(dim, 4 * dim) for _ in range(depth))
        self.residuals = nn.ModuleList(ScaledResidual(rate) for rate in drop_path)
        self.local_perception_units = nn.ModuleList(
            DepthwiseConv(dim) for _ in range(depth if plus_plus else 0)
        )

    def forward(self, x: Tensor, run) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``run(block, *inputs)`` calls each block."""
        perceptions = self.local_perception_units or [None] * len(self.attns)
        for d, perception in enumerate(perceptions):
            norm1, norm2 = self.layer_norms[2 * d], self.layer_norms[2 * d + 1]
            parts = norm1, self.attns[d], norm2, self.mlps[d], self.residuals[d]
            x = run(dat_block, x, perception, *parts)
        return x


@MODELS.register_module()
class DAT(PyramidBackbone):
    """DAT and DAT++, for images of any size from 32 x 32.

    Args:
        arch: 'tiny', 'small', 'base' (DAT), 'tiny++', 'small++', 'base++' (DAT++), or a dict with
            :class:`DATArch`'s fields.
        img_size: image side in pixels for which the position tables of D blocks have one entry for
            each displacement; images may have any size.
        window_size: side of the windows of L and S blocks in tokens: 7, or 12 in DAT-B at 384.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None takes the architecture's published rate.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in the backward pass instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and images of
            other sizes do not compile them anew.
        init_cfg: mmengine's initialisation; 'Pretrained' takes the published files.

    Raises:
        ValueError: an argument is out of range; the message names it, and the stage.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int = 224,
        window_size: int = 7,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        compile_blocks: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(out_indices, frozen_stages, with_cp, compile_blocks, init_cfg)
        arch = look_up_arch(arch, arch_zoo, 'DAT')
        dims = per_stage('dims', arch.dims)
        _check_blocks(arch.blocks)
        for name in ('num_heads', 'strides', 'kernel_sizes'):
            per_stage(name, getattr(arch, name))
        per_stage('groups', arch.groups, minimum=0)
        for name, value in (('img_size', img_size), ('window_size', window_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}')
        rate = arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        rates = drop_path_rates(check_rate('drop_path_rate', rate), [len(b) for b in arch.blocks])

        self.patch_proj = (
            overlapping_stem(dims[0]) if arch.plus_plus else Patchify(3, dims[0], 4, bias=True)
        )
        self.stages = nn.ModuleList(
            DATStage(
                dims[i],
                [_attention(arch, i, letter, img_size, window_size) for letter in arch.blocks[i]],
                rates[i],
                arch.plus_plus,
            )
            for i in range(self.num_built_stages)
        )
        self.down_projs = nn.ModuleList(
            _downsample(dims[i], dims[i + 1], arch.plus_plus)
            for i in range(self.num_built_stages - 1)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(dims[i]))
        self.apply(init_linear)
        self.apply(channel_last_kernels)
        stages = (
            [stage, *self.down_projs[i : i + 1], *self.output_norm(i)]
            for i, stage in enumerate(self.stages)
        )
        self.freeze([[self.patch_proj], *stages])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> for each of ``out_indices`` a map (B, C_i, H_i, W_i), H_i = ceil(H / 2**(i+2))."""
        check_image(x)
        x = self.patch_proj(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x.permute(0, 2, 3, 1), self.run)
            # Channel-first in memory too: mmcv's compiled operators read it so, whatever the strides.
            outputs += [norm(x).permute(0, 3, 1, 2).contiguous() for norm in self.output_norm(i)]
            x = x.permute(0, 3, 1, 2)
            if i < len(self.down_projs):
                x = self.down_projs[i](x)
        return tuple(outputs)


def _downsample(dim: int, out_dim: int, plus_plus: bool) -> nn.Module:
    if plus_plus:
        conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False)
        return nn.Sequential(conv, ChannelNorm(out_dim))
    return Patchify(dim, out_dim, 2, bias=False)


def _attention(arch: DATArch, i: int, letter: str, img_size: int, window_size: int) -> nn.Module:
    """The attention of a block of stage i."""
    dim, num_heads = arch.dims[i], arch.num_heads[i]
    try:
        if letter == 'L':
            return WindowAttention(dim, num_heads, window_size)
        if letter == 'S':
            return WindowAttention(dim, num_heads, window_size, shift=(window_size + 1) // 2)
        if letter == 'N':
            return NeighborhoodAttention(dim, num_heads, NEIGHBORHOOD)
        return DeformableAttention(
            dim,
            num_heads,
            arch.groups[i],
            table_size=-(-img_size // 2 ** (i + 2)),
            stride=arch.strides[i],
            kernel_size=arch.kernel_sizes[i],
            offset_range=arch.offset_range,
            plus_plus=arch.plus_plus,
            offsets=arch.offsets,
            position_bias=arch.position_bias,
        )
    except ValueError as error:
        raise ValueError(f'stage {i}, block {letter}: {error}') from error


def _check_blocks(blocks: Sequence[str]) -> None:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != NUM_STAGES:
        raise ValueError(
            f'blocks must be {NUM_STAGES} strings of letters, one a stage, got {blocks!r}'
        )
    for i, letters in enumerate(blocks):
        if not letters or not set(letters) <= set('LSND'):
            raise ValueError(f'blocks of stage {i} must be letters of L, S, N, D, got {letters!r}')
