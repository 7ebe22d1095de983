"""A pyramid transformer with QuadTree attention, Tang et al., ICLR 2022, arXiv 2201.02767.

Four stages at 1/4 to 1/32 of the image, each behind an overlapping patch embedding and with as many pyramid
levels in its attention as bring its map down to 1/32. Each stage's output norm also feeds the next stage. Maps
are channel-last, (B, H, W, C); parameters have the published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.registry import MODELS
from torch import Tensor, nn

from mmattn.attention.quadtree import VALUE_ACTS, QuadTreeAttention, check_attn_type, check_topks
from mmattn.layers import Mlp, ScaledResidual

from .base import (
    PyramidBackbone,
    channel_last_kernels,
    check_image,
    check_rate,
    drop_path_rates,
    init_linear,
    look_up_arch,
    per_stage,
)

NORM_EPS = 1e-6  # of all norms but those of the patch embeddings


@dataclass(frozen=True)
class QuadTreeArch:
    """A row of the paper's table of variants, with one number a stage in each field.

    Attributes:
        embed_dims: channels.
        depths: blocks.
        num_heads: heads.
        mlp_ratios: hidden channels of the MLP over channels.
        num_levels: levels of the attention's pyramids.
    """

    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int] = (1, 2, 5, 8)
    mlp_ratios: Sequence[int] = (8, 8, 4, 4)
    num_levels: Sequence[int] = (4, 3, 2, 1)


arch_zoo = {
    'b0': QuadTreeArch((32, 64, 160, 256), (2, 2, 2, 2)),
    'b1': QuadTreeArch((64, 128, 320, 512), (2, 2, 2, 2)),
    'b2': QuadTreeArch((64, 128, 320, 512), (3, 4, 6, 3)),
    'b3': QuadTreeArch((64, 128, 320, 512), (3, 4, 18, 3)),
    'b4': QuadTreeArch((64, 128, 320, 512), (3, 8, 27, 3)),
}


class PatchEmbed(nn.Module):
    """Overlapping patches: (B, C, H, W) -> (B, ceil(H/stride), ceil(W/stride), out_dim)."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class DepthwiseConv(nn.Module):
    """A depthwise 3 x 3 convolution on (B, H, W, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvMlp(Mlp):
    """Linear, depthwise convolution, exact GELU, linear on (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.dwconv(self.fc1(x)))


class QuadTreeBlock(nn.Module):
    """Norm, attention, residual, norm, MLP, residual, on (B, H, W, C).

    Args:
        attention: takes the normed map, channel-first.
        dim: channels C.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, attention: nn.Module, dim: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = ConvMlp(dim, dim * mlp_ratio)
        self.residual = ScaledResidual(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attn(self.norm1(x).permute(0, 3, 1, 2))
        x = self.residual(x, attended.permute(0, 2, 3, 1))
        return self.residual(x, self.mlp(self.norm2(x)))


@MODELS.register_module()
class QuadTree(PyramidBackbone):
    """Pyramid transformer with QuadTree attention, arXiv 2201.02767, for images of any size from 32 x 32.

    Args:
        arch: 'b0', 'b1', 'b2', 'b3', 'b4', or a dict with :class:`QuadTreeArch`'s fields.
        attn_type: 'B' (the published weights) or 'A' (section 3).
        topks: keys that each query keeps at a pyramid level: one number (8 in the published classifiers, 32 in
            the published detectors), or one for each level of the highest pyramid, coarsest first; a stage with
            fewer levels takes the first ones.
        value_act: activation in type B's value branches, 'ReLU' (published detectors and segmentors) or 'GELU'
            (published classifiers). Type A has none.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None takes the published ImageNet rate, 0.1.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in the backward pass instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and images of
            other sizes do not compile them anew.
        init_cfg: mmengine's initialisation; 'Pretrained' takes the published files.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    def __init__(
        self,
        arch: str | dict = 'b2',
        attn_type: str = 'B',
        topks: int | Sequence[int] = 32,
        value_act: str = 'ReLU',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = 0.1,
        frozen_stages: int = -1,
        with_cp: bool = False,
        compile_blocks: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(out_indices, frozen_stages, with_cp, compile_blocks, init_cfg)
        arch = look_up_arch(arch, arch_zoo, 'QuadTree')
        dims, depths, num_heads, mlp_ratios, num_levels = (
            per_stage(name, getattr(arch, name)) for name in QuadTreeArch.__dataclass_fields__
        )
        check_attn_type(attn_type)
        check_topks(topks, max(num_levels))
        if value_act not in VALUE_ACTS:
            raise ValueError(f'value_act must be one of {", ".join(VALUE_ACTS)}, got {value_act!r}')
        rate = 0.1 if drop_path_rate is None else drop_path_rate
        rates = drop_path_rates(check_rate('drop_path_rate', rate), depths)

        for i in range(self.num_built_stages):
            embed = PatchEmbed(dims[i - 1], dims[i], 3, 2) if i else PatchEmbed(3, dims[0], 7, 4)
            levels = num_levels[i]
            own_topks = topks if isinstance(topks, int) else tuple(topks[:levels])
            is_b = attn_type == 'B'
            blocks = nn.ModuleList(
                QuadTreeBlock(
                    QuadTreeAttention(
                        dims[i],
                        num_heads[i],
                        levels,
                        own_topks,
                        attn_type,
                        value_act if is_b else None,
                        lepe=is_b,
                        level_weights=is_b,
                    ),
                    dims[i],
                    mlp_ratios[i],
                    drop_path,
                )
                for drop_path in rates[i]
            )
            self.add_module(f'patch_embed{i + 1}', embed)
            self.add_module(f'block{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', nn.LayerNorm(dims[i], eps=NORM_EPS))
        self.apply(init_linear)
        self.apply(channel_last_kernels)
        stages = [list(self.stage(i)) for i in range(self.num_built_stages)]
        self.freeze([[self.patch_embed1], *stages])

    def stage(self, i: int) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
        """Patch embedding, blocks and norm of stage ``i``, from 0; the published names count from 1."""
        return tuple(getattr(self, f'{part}{i + 1}') for part in ('patch_embed', 'block', 'norm'))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> for each of ``out_indices`` a map (B, C_i, H_i, W_i), H_i = ceil(H / 2**(i+2))."""
        check_image(x)
        outputs = []
        for i in range(self.num_built_stages):
            embed, blocks, norm = self.stage(i)
            x = embed(x)
            for block in blocks:
                x = self.run(block, x)
            x = norm(x).permute(0, 3, 1, 2)
            if i in self.out_indices:
                # Channel-first in memory too: mmcv's compiled operators read it so, whatever the strides.
                outputs.append(x.contiguous())
        return tuple(outputs)
