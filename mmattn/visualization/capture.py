"""What the attention modules of a model are given in one of its ordinary forward passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mmattn.attention import (
    DeformableAttention,
    GlobalWindowAttention,
    NeighborhoodAttention,
    QuadTreeAttention,
    WindowAttention,
)
from mmattn.backbones.base import PyramidBackbone

STEM_STRIDE = 4  # pixels a token in stage 0; each stage doubles it

# Attention modules by stage and block, in our backbones and in mmdet's Swin.
ATTENTION_NAME = r'stages\.(\d+)\.blocks\.(\d+)\.attn'


@dataclass(frozen=True)
class Block:
    """An attention module, and what it was given for one image.

    Attributes:
        stage: of the backbone, from 0.
        index: of the block in its stage, from 0.
        kind: 'local', 'shifted', 'global', 'neighborhood', 'deformable' or 'quadtree'.
        module: the attention module.
        inputs: what it was called with; maps with a batch of 1.
        size: rows and columns of its map, in tokens.
    """

    stage: int
    index: int
    kind: str
    module: nn.Module
    inputs: tuple
    size: tuple[int, int]

    @property
    def stride(self) -> int:
        """Pixels of the image along one side of a token."""
        return STEM_STRIDE * 2**self.stage

    @property
    def num_heads(self) -> int:
        module = getattr(self.module, 'w_msa', self.module)  # mmdet's Swin has it one deeper
        return module.num_heads

    @property
    def title(self) -> str:
        return f'stage {self.stage}, block {self.index} ({self.kind})'

    def token(self, y: float, x: float) -> tuple[int, int]:
        """The token (row, column) of the map that holds a point of the image, in pixels."""
        return tuple(
            min(max(int(place // self.stride), 0), side - 1)
            for place, side in zip((y, x), self.size, strict=True)
        )


@dataclass
class Capture:
    """What the latest forward pass under :func:`capture` left, for the first image of its batch.

    Attributes:
        blocks: in the order in which they ran.
        features: the backbone's outputs, each (1, C_i, H_i, W_i).
        input_size: rows and columns of the images that the backbone was given, in pixels.
    """

    blocks: list[Block] = field(default_factory=list)
    features: tuple[Tensor, ...] = ()
    input_size: tuple[int, int] = (0, 0)

    def block(self, stage: int | None = None, *kinds: str) -> Block:
        """The last block of a stage (None: of all), of one of these kinds if any are named.

        Raises:
            ValueError: there is none; the message lists what there is.
        """
        found = [
            block
            for block in self.blocks
            if stage in (None, block.stage) and (not kinds or block.kind in kinds)
        ]
        if not found:
            wanted = ' or '.join(kinds) or 'any'
            raise ValueError(
                f'there is no block of {wanted} attention in stage {stage}; there is {self.summary()}'
            )
        return found[-1]

    def last_blocks(self, *kinds: str) -> list[Block]:
        """The last block of each of these kinds (none: of all) in each stage."""
        last = {
            (block.stage, block.kind): block
            for block in self.blocks
            if not kinds or block.kind in kinds
        }
        return list(last.values())

    def summary(self) -> str:
        """The stages with their kinds of attention and numbers of heads, in one line."""
        stages = {}
        for block in self.blocks:
            stages.setdefault((block.stage, block.num_heads), {})[block.kind] = None
        return '; '.join(
            f'stage {stage}: {", ".join(kinds)} ({heads} head{"s" * (heads > 1)})'
            for (stage, heads), kinds in stages.items()
        )


@contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Forward passes of ``model`` inside the block fill the :class:`Capture` that it gives; the latest one counts.

    Only the modules' inputs are kept, so the pass is the one that always runs, whichever operators serve.

    Args:
        model: one of our backbones or mmdet's SwinTransformer, alone or inside a detector, segmentor, classifier.

    Raises:
        TypeError: there is no such backbone.
    """
    backbone = find_backbone(model)
    seen = Capture()
    handles = [
        backbone.register_forward_pre_hook(partial(_start, seen)),
        backbone.register_forward_hook(partial(_finish, seen)),
    ]
    for stage, index, module in _attention_modules(backbone):
        handles.append(module.register_forward_pre_hook(partial(_keep, seen, stage, index)))
    try:
        # What was compiled before would not call the hooks.
        with torch.compiler.set_stance('force_eager'):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's parameters want no gradients inside the block, which spares what their graph would hold."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def find_backbone(model: nn.Module) -> nn.Module:
    """The backbone that can be looked into: one of ours, or mmdet's Swin.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PyramidBackbone) or _is_mmdet_swin(module):
            return module
    raise TypeError(
        'attention is shown of the backbones GCViT, DAT and QuadTree, and of mmdet.SwinTransformer to compare; '
        f'there is none in this {type(model).__name__}'
    )


def _is_mmdet_swin(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == 'SwinTransformer' and kind.__module__.startswith('mmdet.')


def _attention_modules(backbone: nn.Module) -> Iterator[tuple[int, int, nn.Module]]:
    for name, module in backbone.named_modules():
        if match := re.fullmatch(ATTENTION_NAME, name):
            yield int(match[1]), int(match[2]), module


def _start(seen: Capture, backbone: nn.Module, inputs: tuple) -> None:
    seen.blocks.clear()
    seen.input_size = tuple(inputs[0].shape[2:])


def _finish(seen: Capture, backbone: nn.Module, inputs: tuple, outputs: tuple) -> None:
    seen.features = tuple(output[:1].detach() for output in outputs)


def _keep(seen: Capture, stage: int, index: int, module: nn.Module, inputs: tuple) -> None:
    dtype = next(module.parameters()).dtype  # under autocast the maps may have another
    inputs = tuple(
        value[:1].detach().to(dtype) if isinstance(value, Tensor) else value for value in inputs
    )
    kind, size = _describe(module, inputs)
    seen.blocks.append(Block(stage, index, kind, module, inputs, size))


_KINDS = {
    QuadTreeAttention: 'quadtree',
    GlobalWindowAttention: 'global',
    NeighborhoodAttention: 'neighborhood',
    DeformableAttention: 'deformable',
}


def _describe(module: nn.Module, inputs: tuple) -> tuple[str, tuple[int, int]]:
    """Kind of an attention module, and rows and columns of its map."""
    for kind, name in _KINDS.items():
        if isinstance(module, kind):
            return name, tuple(inputs[0].shape[1:3])
    if isinstance(module, WindowAttention):
        return 'shifted' if module.shift else 'local', tuple(inputs[0].shape[1:3])
    return 'shifted' if module.shift_size else 'local', tuple(inputs[1])  # mmdet's ShiftWindowMSA


def tokens_of(block: Block, queries: Tensor) -> Tensor:
    """Row-major indices (n,) of queries (n, 2), (row, column) in tokens.

    Raises:
        ValueError: a query is outside the map.
    """
    queries = torch.as_tensor(queries, device=block.inputs[0].device).reshape(-1, 2).long()
    limits = queries.new_tensor(block.size)
    if ((queries < 0) | (queries >= limits)).any():
        raise ValueError(
            f'queries of {block.title} must lie in its map of {block.size[0]} x {block.size[1]} tokens, '
            f'got {queries.tolist()}'
        )
    return queries[:, 0] * block.size[1] + queries[:, 1]
