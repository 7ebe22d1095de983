"""Recording of the inputs of a model's attention modules during a forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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

STEM_STRIDE = 4  # pixels per token in stage 0; each stage doubles it

# Names of attention modules, with stage and block, in our backbones and in mmdet's Swin.
ATTENTION_NAME = r'stages\.(\d+)\.blocks\.(\d+)\.attn'


@dataclass(frozen=True)
class Block:
    """An attention module and its inputs for one image.

    Attributes:
        stage: index of the stage, from 0.
        index: index of the block in its stage, from 0.
        kind: 'local', 'shifted', 'global', 'neighborhood', 'deformable' or 'quadtree'.
        module: the attention module, one of :mod:`mmattn.attention` or mmdet's ShiftWindowMSA.
        inputs: arguments of its call; maps have a batch of 1.
        size: rows and columns of its map, in tokens.
    """

    stage: int
    index: int
    kind: str
    module: Any  # by ``kind``
    inputs: tuple
    size: tuple[int, int]

    @property
    def stride(self) -> int:
        """Side of a token in pixels of the image."""
        return STEM_STRIDE * 2**self.stage

    @property
    def num_heads(self) -> int:
        return getattr(self.module, 'w_msa', self.module).num_heads  # w_msa: mmdet's Swin

    @property
    def title(self) -> str:
        return f'stage {self.stage}, block {self.index} ({self.kind})'

    def token(self, y: float, x: float) -> tuple[int, int]:
        """Token (row, column) that contains a point of the image, in pixels; clipped to the map."""
        row, column = (
            min(max(int(value // self.stride), 0), side - 1)
            for value, side in zip((y, x), self.size, strict=True)
        )
        return row, column


@dataclass
class Capture:
    """Record of the latest forward pass under :func:`capture`, for the first image of its batch.

    Attributes:
        blocks: attention blocks in the order in which they ran.
        features: the backbone's outputs, each (1, C_i, H_i, W_i).
        input_size: rows and columns of the backbone's input, in pixels.
    """

    blocks: list[Block] = field(default_factory=list)
    features: tuple[Tensor, ...] = ()
    input_size: tuple[int, int] = (0, 0)

    def block(self, stage: int | None = None, *kinds: str) -> Block:
        """Last block of a stage.

        Args:
            stage: None takes the last block of all stages.
            kinds: accepted kinds of attention; without any, all.

        Raises:
            ValueError: there is no such block; the message lists what there is.
        """
        found = [
            block
            for block in self.blocks
            if stage in (None, block.stage) and (not kinds or block.kind in kinds)
        ]
        if not found:
            wanted = ' or '.join(kinds) or 'any'
            raise ValueError(
                f'there is no block of {wanted} attention in stage {stage}; '
                f'there is {self.summary()}'
            )
        return found[-1]

    def last_blocks(self, *kinds: str) -> list[Block]:
        """Last block of each kind in each stage; without ``kinds``, of all kinds."""
        last = {
            (block.stage, block.kind): block
            for block in self.blocks
            if not kinds or block.kind in kinds
        }
        return list(last.values())

    def summary(self) -> str:
        """Stages with their kinds of attention and numbers of heads, in one line."""
        stages: dict[tuple[int, int], dict[str, None]] = {}
        for block in self.blocks:
            stages.setdefault((block.stage, block.num_heads), {})[block.kind] = None
        return '; '.join(
            f'stage {stage}: {", ".join(kinds)} ({heads} head{"s" * (heads > 1)})'
            for (stage, heads), kinds in stages.items()
        )


@contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Record forward passes of ``model`` in the ``with`` block; the latest one counts.

    Only the inputs of attention modules and the features are stored, so the model runs as usual,
    with any backend of the operators.

    Args:
        model: a backbone of mmattn or mmdet's SwinTransformer, alone or inside a detector,
            segmentor or classifier.

    Yields:
        The :class:`Capture` that the forward passes fill.

    Raises:
        TypeError: the model has no such backbone.
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
        # Code that was compiled before would not call the hooks.
        with torch.compiler.set_stance('force_eager'):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients of the model's parameters in the ``with`` block, to save memory."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def find_backbone(model: nn.Module) -> nn.Module:
    """First module that :func:`capture` supports: a backbone of mmattn or mmdet's Swin.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PyramidBackbone) or _is_mmdet_swin(module):
            return module
    raise TypeError(
        'attention can be shown for the backbones GCViT, DAT and QuadTree, and for '
        f'mmdet.SwinTransformer; there is none of them in this {type(model).__name__}'
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
    dtype = next(module.parameters()).dtype  # autocast may have changed that of the maps
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


def _describe(module: Any, inputs: tuple) -> tuple[str, tuple[int, int]]:
    """Kind of an attention module, and size of its map in tokens."""
    for cls, kind in _KINDS.items():
        if isinstance(module, cls):
            return kind, tuple(inputs[0].shape[1:3])
    if isinstance(module, WindowAttention):
        return 'shifted' if module.shift else 'local', tuple(inputs[0].shape[1:3])
    return 'shifted' if module.shift_size else 'local', tuple(inputs[1])  # mmdet's ShiftWindowMSA


def tokens_of(block: Block, queries: Sequence[tuple[int, int]] | Tensor) -> Tensor:
    """Row-major indices (n,) of queries (n, 2), (row, column) in tokens.

    Raises:
        ValueError: a query is outside the map.
    """
    queries = torch.as_tensor(queries, device=block.inputs[0].device).reshape(-1, 2).long()
    limits = queries.new_tensor(block.size)
    if ((queries < 0) | (queries >= limits)).any():
        raise ValueError(
            f'queries of {block.title} must lie in its map of '
            f'{block.size[0]} x {block.size[1]} tokens, got {queries.tolist()}'
        )
    return queries[:, 0] * block.size[1] + queries[:, 1]
