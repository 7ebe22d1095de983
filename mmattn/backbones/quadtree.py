"""A pyramid transformer with QuadTree attention, Tang et al., ICLR 2022, arXiv 2201.02767.

Four stages at 1/4 to 1/32 of the image, each after an overlapping patch embedding and with as many
pyramid levels in its attention as bring its map down to 1/32. Each stage's norm also feeds the next
stage. Maps are channel-last, (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.registry import MODELS
from torch import nn

from mmattn.attention.pyramid import check_attn_type, check_topks
from mmattn.attention.quadtree import VALUE_ACTS, QuadTreeAttention
from mmattn.layers import ConvMlp, ConvNorm

from .base import (
    PyramidBackbone,
    Stage,
    TransformerBlock,
    check_channels,
    drop_path_rates,
    look_up_arch,
    per_stage,
    stage_indices,
)

NORM_EPS = 1e-6  # of all norms except those of the patch embeddings


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


@MODELS.register_module()
class QuadTree(PyramidBackbone):
    """Pyramid transformer with QuadTree attention, arXiv 2201.02767, for images of any size.

    Args:
        arch: 'b0', 'b1', 'b2', 'b3', 'b4', or a dict with the fields of :class:`QuadTreeArch`.
        attn_type: 'B' (the published weights) or 'A' (section 3).
        topks: keys that each query keeps at a pyramid level: one number (8 in the published
            classifiers, 32 in the published detectors), or one for each level of the highest
            pyramid, coarsest first; a stage with fewer levels takes the first ones.
        value_act: activation in type B's value branches, 'ReLU' (published detectors and
            segmentors) or 'GELU' (published classifiers). Type A has none.
        out_indices: stages whose maps are returned.
        drop_path_rate: stochastic depth of the last block; None: the published ImageNet rate, 0.1.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages.
        with_cp: recompute blocks in backward instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``; the first steps take minutes, and
            other image sizes compile nothing anew.
        in_channels: channels of the images.
        init_cfg: mmengine's initialization; 'Pretrained' takes the published files.
        pretrained: file or URL, short for an ``init_cfg`` of that type; mmseg's models pass it on.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    family = 'quadtree'

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
        in_channels: int = 3,
        init_cfg: dict | list | None = None,
        pretrained: str | None = None,
    ):
        row = look_up_arch(arch, arch_zoo, QuadTreeArch)
        dims = per_stage('embed_dims', row.embed_dims)
        depths = per_stage('depths', row.depths)
        num_heads = per_stage('num_heads', row.num_heads)
        mlp_ratios = per_stage('mlp_ratios', row.mlp_ratios)
        num_levels = per_stage('num_levels', row.num_levels)
        check_attn_type(attn_type)
        check_topks(topks, max(num_levels))
        if value_act not in VALUE_ACTS:
            raise ValueError(f'value_act must be one of {", ".join(VALUE_ACTS)}, got {value_act!r}')
        rates = drop_path_rates(0.1 if drop_path_rate is None else drop_path_rate, depths)
        out_indices = stage_indices(out_indices)

        def attention(i: int) -> QuadTreeAttention:
            levels, is_b = num_levels[i], attn_type == 'B'
            return QuadTreeAttention(
                dims[i],
                num_heads[i],
                levels,
                topks if isinstance(topks, int) else tuple(topks[:levels]),
                attn_type,
                value_act if is_b else None,
                lepe=is_b,
                level_weights=is_b,
            )

        stages = [
            Stage(
                [
                    TransformerBlock(
                        dims[i],
                        attention(i),
                        ConvMlp(dims[i], dims[i] * mlp_ratios[i], residual=False),
                        drop_path,
                        norm_eps=NORM_EPS,
                    )
                    for drop_path in rates[i]
                ],
                ConvNorm(dims[i - 1], dims[i], 3, 2) if i else None,
                nn.LayerNorm(dims[i], eps=NORM_EPS),
                with_cp,
            )
            for i in range(out_indices[-1] + 1)
        ]
        super().__init__(
            ConvNorm(check_channels(in_channels), dims[0], 7, 4),
            stages,
            None,
            in_channels,
            out_indices,
            frozen_stages,
            compile_blocks,
            init_cfg,
            pretrained,
        )
