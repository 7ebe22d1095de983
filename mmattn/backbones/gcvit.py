"""Global Context Vision Transformer (GC ViT), Hatamizadeh et al., ICML 2023, arXiv 2206.09959.

A CNN stem, then four stages at 1/4 to 1/32 of the image. The blocks of a stage alternate between
attention within windows and attention of a global query to the windows; the query is made once a
stage from the whole map. Maps are channel-last, (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmattn.attention import GlobalWindowAttention, WindowAttention
from mmattn.layers import ConvNorm, Mlp, channel_last
from mmattn.ops import recording

from .ablations import MaxPoolDownsample, PatchMergingDownsample
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
    """Channel gates from the map's mean (arXiv 1709.01507).

    Args:
        dim: channels C.
        reduction: of the channels in between.
    """

    def __init__(self, dim: int, reduction: int = 4):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False),
            nn.GELU(),
            nn.Linear(dim // reduction, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


def modified_fused_mbconv(dim: int) -> nn.Sequential:
    """Convolution block of the paper (equation 5) without its residual, on (B, C, H, W)."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        nn.GELU(),
        SqueezeExcite(dim),
        nn.Conv2d(dim, dim, 1, bias=False),
    )


class Downsample(nn.Module):
    """The paper's downsampler (section 3.4).

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = modified_fused_mbconv(dim)
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), out_dim)."""
        x = self.norm1(x).permute(0, 3, 1, 2)
        x = self.reduction(x + self.conv(x))
        return self.norm2(x.permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Two strided convolutions (section 3).

    Args:
        in_channels: of the images.
        dim: channels of the output.
    """

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.downsample = Downsample(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, H, W, in_channels) -> (B, ceil(H/4), ceil(W/4), dim)."""
        return self.downsample(channel_last(self.proj, x))


STEMS: dict[str, Callable[[int, int], nn.Module]] = {
    'conv': ConvStem,
    'patchify': lambda in_channels, dim: ConvNorm(in_channels, dim, 4, 4),
}
DOWNSAMPLERS: dict[str, Callable[[int, int], nn.Module]] = {
    'fused_mbconv': Downsample,
    'max_pool': MaxPoolDownsample,
    'patch_merging': PatchMergingDownsample,
}
ODD_BLOCKS = ('global', 'shifted', 'local')


class FeatureExtract(nn.Module):
    """Step of the global query generator, on (B, C, H, W).

    Args:
        dim: channels C.
        pool: halve the sides.
    """

    def __init__(self, dim: int, pool: bool):
        super().__init__()
        self.conv = modified_fused_mbconv(dim)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), or (B, C, ceil(H/2), ceil(W/2)) if it pools."""
        return self.pool(x + self.conv(x))


class GlobalQueryGenerator(nn.Module):
    """The whole map as one window of queries (section 3.2).

    Args:
        dim: channels C.
        window_size: side of the stage's windows in tokens.
        pools: for each step, whether it pools.
    """

    def __init__(self, dim: int, window_size: int, pools: Sequence[bool]):
        super().__init__()
        self.window_size = window_size
        self.steps = nn.Sequential(*(FeatureExtract(dim, pool) for pool in pools))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, window_size, window_size, C), resized if the steps end elsewhere."""
        x = self.steps(x.permute(0, 3, 1, 2))
        window = (self.window_size, self.window_size)
        if recording() or x.shape[2:] != window:
            x = F.interpolate(x, size=window, mode='bicubic')
        return x.permute(0, 2, 3, 1)


class GCViTStage(Stage):
    """Stage whose global blocks share one query.

    Args:
        blocks, downsample, with_cp: as in :class:`Stage`.
        global_query: makes the query from the stage's map; None without global blocks.
    """

    def __init__(
        self,
        blocks: Sequence[TransformerBlock],
        downsample: nn.Module | None,
        global_query: GlobalQueryGenerator | None,
        with_cp: bool,
    ):
        super().__init__(blocks, downsample, with_cp=with_cp)
        self.global_query = global_query

    def block_inputs(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """The global query for every second block, (B, window_size, window_size, C)."""
        if self.global_query is None:
            return super().block_inputs(x)
        query = self.global_query(x)
        return [(query,) if j % 2 else () for j in range(len(self.blocks))]


@MODELS.register_module()
class GCViT(PyramidBackbone):
    """Global Context Vision Transformer, arXiv 2206.09959, for images of any size.

    Args:
        arch: 'xxtiny', 'xtiny', 'tiny', 'tiny2', 'small', 'small2', 'base', 'large', or a dict with
            the fields of :class:`GCViTArch`.
        window_size: side of the windows in tokens, one a stage: (7, 7, 14, 7) in the classifiers at
            224, (12, 12, 24, 12) at 384, (16, 16, 32, 16) at 512, (24, 24, 24, 24) in detectors.
        resolution: image side in pixels that the weights were trained for. Only the number of
            pooling steps of stage 2's global query depends on it.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None: the architecture's published rate.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in backward instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and
            other image sizes compile nothing anew.
        stem: 'conv', or 'patchify' (Swin's; table 5).
        downsampler: between stages, 'fused_mbconv', or 'max_pool', 'patch_merging' (table 8).
        odd_blocks: attention of every second block: 'global', or 'shifted' windows (Swin), 'local'
            (table 5).
        in_channels: channels of the images.
        init_cfg: mmengine's initialization; 'Pretrained' takes the published files.
        pretrained: file or URL, short for an ``init_cfg`` of that type; mmseg's models pass it on.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    family = 'gcvit'

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
        in_channels: int = 3,
        init_cfg: dict | list | None = None,
        pretrained: str | None = None,
    ):
        row = look_up_arch(arch, arch_zoo, GCViTArch)
        depths = per_stage('depths', row.depths)
        num_heads = per_stage('num_heads', row.num_heads)
        windows = per_stage('window_size', window_size)
        _check_options(stem, downsampler, odd_blocks, resolution)
        rate = row.drop_path_rate if drop_path_rate is None else drop_path_rate
        rates = drop_path_rates(rate, depths)
        dims = [row.embed_dims * 2**i for i in range(NUM_STAGES)]
        pools = ((True,) * 3, (True,) * 2, (windows[2] != resolution // 16,), (False,))
        has_query = odd_blocks == 'global'
        out_indices = stage_indices(out_indices)
        stages = [
            GCViTStage(
                [
                    TransformerBlock(
                        dims[i],
                        _attention(
                            odd_blocks if j % 2 else 'local', dims[i], num_heads[i], windows[i]
                        ),
                        Mlp(dims[i], int(dims[i] * row.mlp_ratio)),
                        rates[i][j],
                        row.layer_scale,
                    )
                    for j in range(depths[i])
                ],
                DOWNSAMPLERS[downsampler](dims[i - 1], dims[i]) if i else None,
                GlobalQueryGenerator(dims[i], windows[i], pools[i])
                if has_query and depths[i] > 1
                else None,
                with_cp,
            )
            for i in range(out_indices[-1] + 1)
        ]
        super().__init__(
            STEMS[stem](check_channels(in_channels), dims[0]),
            stages,
            dims,
            in_channels,
            out_indices,
            frozen_stages,
            compile_blocks,
            init_cfg,
            pretrained,
        )


def _attention(kind: str, dim: int, num_heads: int, window_size: int) -> nn.Module:
    if kind == 'global':
        return GlobalWindowAttention(dim, num_heads, window_size)
    shift = window_size // 2 if kind == 'shifted' else 0
    return WindowAttention(dim, num_heads, window_size, shift)


def _check_options(stem: str, downsampler: str, odd_blocks: str, resolution: int) -> None:
    for name, value, choices in (
        ('stem', stem, STEMS),
        ('downsampler', downsampler, DOWNSAMPLERS),
        ('odd_blocks', odd_blocks, ODD_BLOCKS),
    ):
        if value not in choices:
            raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f'resolution must be a positive number of pixels, got {resolution!r}')
