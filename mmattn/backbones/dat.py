"""Deformable Attention Transformer: DAT (CVPR 2022, arXiv 2201.00520), DAT++ (arXiv 2309.01430).

A convolutional stem, then four stages at 1/4 to 1/32 of the image, each a sequence of blocks with
local (L), shifted-window (S), neighborhood (N) or deformable (D) attention. DAT++ adds
convolutions: an overlapping stem and downsampling, a depthwise one before each block and one in
its MLP. Maps are channel-last, (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.registry import MODELS
from torch import nn

from mmattn.attention import DeformableAttention, NeighborhoodAttention, WindowAttention
from mmattn.layers import ConvMlp, ConvNorm, Mlp

from .base import (
    NUM_STAGES,
    PyramidBackbone,
    Stage,
    TransformerBlock,
    check_channels,
    drop_path_rates,
    look_up_arch,
    per_stage,
    stage_indices,
)

NEIGHBORHOOD = 7  # side of N blocks' neighborhoods in tokens
MLP_RATIO = 4


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


def _plus_plus(
    dims: Sequence[int], num_heads: Sequence[int], groups: Sequence[int], drop_path_rate: float
) -> DATArch:
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


@MODELS.register_module()
class DAT(PyramidBackbone):
    """DAT and DAT++, for images of any size.

    Args:
        arch: 'tiny', 'small', 'base' (DAT), 'tiny++', 'small++', 'base++' (DAT++), or a dict with
            the fields of :class:`DATArch`.
        img_size: image side in pixels for which the position tables of D blocks have one entry for
            each displacement; images may have any size.
        window_size: side of the windows of L and S blocks in tokens: 7, or 12 in DAT-B at 384.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None: the architecture's published rate.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in backward instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and
            other image sizes compile nothing anew.
        in_channels: channels of the images.
        init_cfg: mmengine's initialization; 'Pretrained' takes the published files.
        pretrained: file or URL, short for an ``init_cfg`` of that type; mmseg's models pass it on.

    Raises:
        ValueError: an argument is out of range; the message names it, and the stage.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    family = 'dat'

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
        in_channels: int = 3,
        init_cfg: dict | list | None = None,
        pretrained: str | None = None,
    ):
        row = look_up_arch(arch, arch_zoo, DATArch)
        dims = per_stage('dims', row.dims)
        _check_blocks(row.blocks)
        for name in ('num_heads', 'strides', 'kernel_sizes'):
            per_stage(name, getattr(row, name))
        per_stage('groups', row.groups, minimum=0)
        for name, value in (('img_size', img_size), ('window_size', window_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}')
        rate = row.drop_path_rate if drop_path_rate is None else drop_path_rate
        rates = drop_path_rates(rate, [len(letters) for letters in row.blocks])
        out_indices = stage_indices(out_indices)
        stages = [
            Stage(
                [
                    _block(row, i, _attention(row, i, letter, img_size, window_size), drop_path)
                    for letter, drop_path in zip(row.blocks[i], rates[i], strict=True)
                ],
                _downsample(dims[i - 1], dims[i], row.plus_plus) if i else None,
                with_cp=with_cp,
            )
            for i in range(out_indices[-1] + 1)
        ]
        super().__init__(
            _stem(check_channels(in_channels), dims[0], row.plus_plus),
            stages,
            dims,
            in_channels,
            out_indices,
            frozen_stages,
            compile_blocks,
            init_cfg,
            pretrained,
        )


def _stem(in_channels: int, dim: int, plus_plus: bool) -> nn.Module:
    """Stem to 1/4 of the image: patches of 4 x 4 pixels, or DAT++'s two strided convolutions."""
    if not plus_plus:
        return ConvNorm(in_channels, dim, 4, 4)
    return nn.Sequential(
        ConvNorm(in_channels, dim // 2, 3, 2), nn.GELU(), ConvNorm(dim // 2, dim, 3, 2)
    )


def _downsample(dim: int, out_dim: int, plus_plus: bool) -> ConvNorm:
    return ConvNorm(dim, out_dim, 3 if plus_plus else 2, 2, bias=False)


def _block(row: DATArch, i: int, attention: nn.Module, drop_path: float) -> TransformerBlock:
    dim = row.dims[i]
    if not row.plus_plus:
        return TransformerBlock(dim, attention, Mlp(dim, MLP_RATIO * dim), drop_path)
    mlp = ConvMlp(dim, MLP_RATIO * dim, residual=True)
    conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
    return TransformerBlock(dim, attention, mlp, drop_path, conv=conv)


def _attention(row: DATArch, i: int, letter: str, img_size: int, window_size: int) -> nn.Module:
    dim, num_heads = row.dims[i], row.num_heads[i]
    try:
        if letter == 'L':
            return WindowAttention(dim, num_heads, window_size)
        if letter == 'S':  # DAT's shift is rounded up, Swin's down
            return WindowAttention(dim, num_heads, window_size, shift=(window_size + 1) // 2)
        if letter == 'N':
            return NeighborhoodAttention(dim, num_heads, NEIGHBORHOOD)
        return DeformableAttention(
            dim,
            num_heads,
            row.groups[i],
            table_size=-(-img_size // 2 ** (i + 2)),
            stride=row.strides[i],
            kernel_size=row.kernel_sizes[i],
            offset_range=row.offset_range,
            plus_plus=row.plus_plus,
            offsets=row.offsets,
            position_bias=row.position_bias,
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
