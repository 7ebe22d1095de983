"""Global Context Vision Transformer (GC ViT), Hatamizadeh et al., ICML 2023, arXiv 2206.09959.

A CNN stem, then four stages at 1/4 to 1/32 of the image. The blocks of a stage alternate between attention
within windows and attention of a global query to the windows; the query is made once a stage from the whole
image. Maps are channel-last, (B, H, W, C); parameters have the published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import PatchEmbed, PatchMerging
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmattn.attention import GlobalWindowAttention, WindowAttention
from mmattn.layers import Mlp, ScaledResidual

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
class GCViTArch:
    """A row of the paper's table of variants; stage i has ``embed_dims * 2**i`` channels."""

    embed_dims: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    mlp_ratio: float
    drop_path_rate: float = 0.0
    layer_scale: float | None = None


arch_zoo = {
    'xxtiny': GCViTArch(64, (2, 2, 6, 2), (2, 4, 8, 16), 3, 0.2),
    'xtiny': GCViTArch(64, (3, 4, 6, 5), (2, 4, 8, 16), 3, 0.2),
    'tiny': GCViTArch(64, (3, 4, 19, 5), (2, 4, 8, 16), 3, 0.2),
    'tiny2': GCViTArch(64, (3, 4, 29, 5), (2, 4, 8, 16), 3, 0.25),
    'small': GCViTArch(96, (3, 4, 19, 5), (3, 6, 12, 24), 2, 0.3, 1e-5),
    'small2': GCViTArch(96, (3, 4, 23, 5), (3, 6, 12, 24), 3, 0.35, 1e-5),
    'base': GCViTArch(128, (3, 4, 19, 5), (4, 8, 16, 32), 2, 0.5, 1e-5),
    'large': GCViTArch(192, (3, 4, 19, 5), (6, 12, 24, 48), 2, 0.5, 1e-5),
}


class SqueezeExcite(nn.Module):
    """Channel gates from the map's mean (arXiv 1709.01507), on (B, C, H, W)."""

    def __init__(self, dim: int, reduction: int = 4):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False),
            nn.GELU(),
            nn.Linear(dim // reduction, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


def modified_fused_mbconv(dim: int) -> nn.Sequential:
    """The paper's convolution block (equation 5), without its residual, on (B, C, H, W)."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        nn.GELU(),
        SqueezeExcite(dim),
        nn.Conv2d(dim, dim, 1, bias=False),
    )


class Downsample(nn.Module):
    """The paper's downsampler: halves the map, (B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), out_dim)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = modified_fused_mbconv(dim)
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x).permute(0, 3, 1, 2)
        x = self.reduction(x + self.conv(x))
        return self.norm2(x.permute(0, 2, 3, 1))


class MaxPoolDownsample(nn.Module):
    """Table 8's first alternative: a convolution and max pooling."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x.permute(0, 3, 1, 2)))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMergingDownsample(PatchMerging):
    """Table 8's second alternative: Swin's patch merging."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, size = super().forward(x.flatten(1, 2), x.shape[1:3])
        return tokens.unflatten(1, size)


DOWNSAMPLERS = {
    'fused_mbconv': Downsample,
    'max_pool': MaxPoolDownsample,
    'patch_merging': PatchMergingDownsample,
}


class ConvStem(nn.Module):
    """Images (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), dim) by two strided convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 3, stride=2, padding=1)
        self.conv_down = Downsample(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(self.proj(x).permute(0, 2, 3, 1))


class PatchifyStem(PatchEmbed):
    """Table 5's starting point, Swin's stem: non-overlapping patches of 4 x 4 pixels."""

    def __init__(self, dim: int):
        super().__init__(embed_dims=dim, kernel_size=4, stride=4, norm_cfg=dict(type='LN'))

    def forward(self, x: Tensor) -> Tensor:
        tokens, size = super().forward(x)
        return tokens.unflatten(1, size)


STEMS = {'conv': ConvStem, 'patchify': PatchifyStem}


class FeatureExtract(nn.Module):
    """A step of the global query generator, (B, C, H, W) -> the same, or half of each side where it pools."""

    def __init__(self, dim: int, pool: bool):
        super().__init__()
        self.conv = modified_fused_mbconv(dim)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x + self.conv(x))


class GlobalQueryGenerator(nn.Module):
    """The whole map as one window of queries (section 3.2).

    Args:
        dim: channels C.
        window_size: side of the stage's windows in tokens.
        steps: for each step, whether it pools.
    """

    def __init__(self, dim: int, window_size: int, steps: Sequence[bool]):
        super().__init__()
        self.window_size = window_size
        self.to_q_global = nn.Sequential(*(FeatureExtract(dim, pool) for pool in steps))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, window_size, window_size, C), resized where the steps do not end there."""
        x = self.to_q_global(x.permute(0, 3, 1, 2))
        window = (self.window_size, self.window_size)
        if torch.compiler.is_exporting() or x.shape[2:] != window:  # of the same size: the identity
            x = F.interpolate(x, size=window, mode='bicubic')
        return x.permute(0, 2, 3, 1)


class GCViTBlock(nn.Module):
    """Norm, attention, residual, norm, MLP, residual, on (B, H, W, C).

    Args:
        attention: takes the normed map, and the global query where the block gets one.
        dim: channels C.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of the branches' learned scales; without it there are none.
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.residual = ScaledResidual(drop_path)
        for name in ('gamma1', 'gamma2'):
            gamma = (
                None
                if layer_scale is None
                else nn.Parameter(torch.full((dim,), float(layer_scale)))
            )
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor, *global_query: Tensor) -> Tensor:
        x = self.residual(x, self.attn(self.norm1(x), *global_query), self.gamma1)
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma2)


class GCViTStage(nn.Module):
    """Blocks of one resolution, every second of them another kind of attention, and the way down from there."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        query_steps: Sequence[bool],
        odd_blocks: str,
        mlp_ratio: float,
        drop_path: Sequence[float],
        layer_scale: float | None,
        downsample: nn.Module | None,
    ):
        super().__init__()
        attentions = {
            'local': lambda: WindowAttention(dim, num_heads, window_size),
            'shifted': lambda: WindowAttention(dim, num_heads, window_size, shift=window_size // 2),
            'global': lambda: GlobalWindowAttention(dim, num_heads, window_size),
        }
        kinds = ['local' if j % 2 == 0 else odd_blocks for j in range(depth)]
        self.blocks = nn.ModuleList(
            GCViTBlock(attentions[kind](), dim, mlp_ratio, rate, layer_scale)
            for kind, rate in zip(kinds, drop_path, strict=True)
        )
        has_query = 'global' in kinds
        self.q_global_gen = (
            GlobalQueryGenerator(dim, window_size, query_steps) if has_query else None
        )
        self.downsample = downsample

    def forward(self, x: Tensor, run) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C): the blocks alone; ``run(block, *inputs)`` calls each."""
        query = () if self.q_global_gen is None else (self.q_global_gen(x),)
        for j, block in enumerate(self.blocks):
            x = run(block, x, *(query if j % 2 else ()))
        return x


ODD_BLOCKS = ('global', 'shifted', 'local')


@MODELS.register_module()
class GCViT(PyramidBackbone):
    """Global Context Vision Transformer, arXiv 2206.09959, for images of any size from 32 x 32.

    Args:
        arch: 'xxtiny', 'xtiny', 'tiny', 'tiny2', 'small', 'small2', 'base', 'large', or a dict with
            :class:`GCViTArch`'s fields.
        window_size: side of the windows in tokens, one a stage: (7, 7, 14, 7) in the classifiers at 224,
            (12, 12, 24, 12) at 384, (16, 16, 32, 16) at 512, (24, 24, 24, 24) in the detectors.
        resolution: image side in pixels that the weights were trained for. Only the number of pooling steps of
            stage 2's global query follows from it; images may have any size.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None takes the architecture's published rate.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in the backward pass instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and images of
            other sizes do not compile them anew.
        stem: 'conv', or 'patchify' (Swin's; table 5).
        downsampler: between stages, 'fused_mbconv', or 'max_pool', 'patch_merging' (table 8).
        odd_blocks: attention of every second block: 'global', or 'shifted' windows (Swin), 'local' (table 5).
        init_cfg: mmengine's initialisation; 'Pretrained' takes the published files.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        window_size: Sequence[int] = (7, 7, 14, 7),
        resolution: int = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        compile_blocks: bool = False,
        stem: str = 'conv',
        downsampler: str = 'fused_mbconv',
        odd_blocks: str = 'global',
        init_cfg: dict | None = None,
    ):
        super().__init__(out_indices, frozen_stages, with_cp, compile_blocks, init_cfg)
        arch = look_up_arch(arch, arch_zoo, 'GCViT')
        depths = per_stage('depths', arch.depths)
        num_heads = per_stage('num_heads', arch.num_heads)
        window_size = per_stage('window_size', window_size)
        for name, value, choices in (
            ('stem', stem, STEMS),
            ('downsampler', downsampler, DOWNSAMPLERS),
            ('odd_blocks', odd_blocks, ODD_BLOCKS),
        ):
            if value not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')
        if not isinstance(resolution, int) or resolution < 1:
            raise ValueError(f'resolution must be a positive number of pixels, got {resolution!r}')
        rate = arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        rates = drop_path_rates(check_rate('drop_path_rate', rate), depths)
        dims = [arch.embed_dims * 2**i for i in range(NUM_STAGES)]
        query_steps = (
            (True, True, True),
            (True, True),
            (window_size[2] != resolution // 16,),
            (False,),
        )

        self.patch_embed = STEMS[stem](dims[0])
        self.levels = nn.ModuleList(
            GCViTStage(
                dim=dims[i],
                depth=depths[i],
                num_heads=num_heads[i],
                window_size=window_size[i],
                query_steps=query_steps[i],
                odd_blocks=odd_blocks,
                mlp_ratio=arch.mlp_ratio,
                drop_path=rates[i],
                layer_scale=arch.layer_scale,
                downsample=DOWNSAMPLERS[downsampler](dims[i], dims[i + 1])
                if i + 1 < self.num_built_stages
                else None,
            )
            for i in range(self.num_built_stages)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(dims[i]))
        self.apply(init_linear)
        self.apply(channel_last_kernels)
        stages = ([level, *self.output_norm(i)] for i, level in enumerate(self.levels))
        self.freeze([[self.patch_embed], *stages])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> for each of ``out_indices`` a map (B, C_i, H_i, W_i), H_i = ceil(H / 2**(i+2))."""
        check_image(x)
        x = self.patch_embed(x)
        outputs = []
        for i, level in enumerate(self.levels):
            x = level(x, self.run)
            # Channel-first in memory too: mmcv's compiled operators read it so, whatever the strides.
            outputs += [norm(x).permute(0, 3, 1, 2).contiguous() for norm in self.output_norm(i)]
            if level.downsample is not None:
                x = level.downsample(x)
        return tuple(outputs)
