"""Shared parts of the Triton kernels of window and deformable attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights are powers of two, which the hardware computes; scores are multiplied by this to make them
# powers of e.
LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Tile sizes and launch parameters of an attention kernel.

    Attributes:
        own: tokens, queries or keys, whose result a program makes.
        other: keys or queries that it takes in at once.
        channels: channels of a head, padded to what tl.dot takes.
        warps: warps of a program.
        stages: iterations of its loop whose loads are under way at once.
    """

    own: int
    other: int
    channels: int
    warps: int
    stages: int


def choose_tile(own: int, other: int, d: int, dtype: torch.dtype, gathers: bool) -> Tile:
    """Choose the tile for ``own`` tokens against ``other`` ones of ``d`` channels.

    Forward and backward use the same.

    64 x 64 in half precision keeps the scores, their gradient and the accumulators of a program in
    the registers of four warps, fills an instruction of Hopper's tensor cores, and divides windows
    of 8, 16, 24 and 32 tokens a side evenly. Wider types and heads spill registers unless they have
    fewer tokens. Smaller problems get smaller tiles, down to the 16 that tl.dot takes. All sizes
    are powers of two, so that few kernels are compiled however many image sizes come.

    Where each score ``gathers`` its bias from a table, addresses need registers, too: half as many
    other tokens; and loads are not staged, which would send the table's entries through shared
    memory.
    """
    channels = max(16, triton.next_power_of_2(d))
    side = 64 if dtype.itemsize == 2 else 32
    if channels > {2: 128 if gathers else 32, 4: 64, 8: 32}[dtype.itemsize]:
        side //= 2
    own, other = (
        max(16, min(most, triton.next_power_of_2(n)))
        for most, n in ((side, own), (side // 2 if gathers else side, other))
    )
    return Tile(own, other, channels, warps=4, stages=1 if gathers else 2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def last_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if the channels of a token are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context that launches kernels on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def dot(a, b):
    """Matrix product, summed in float32, or in float64 for float64.

    float32 operands are split into three products of tensor cores ('tf32x3'): 22 bits of each
    operand's 24 take part, so that results agree with float32 to rounding, at several times the
    speed of the fused multiply-adds that 'ieee' compiles to.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision='tf32x3')
    else:
        return tl.dot(a, b)


@triton.jit
def load_tokens(rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the tokens of D channels at ``rows``, (tokens, BLOCK_D); zero where not valid."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel[None, :] < D)
    return tl.load(rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(rows, value, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the valid tokens at ``rows``."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel[None, :] < D)
    tl.store(rows[:, None] + channel[None, :], value.to(rows.dtype.element_ty), mask=mask)
