"""What the Triton kernels of window and deformable attention share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How a kernel cuts attention into pieces.

    Attributes:
        queries: queries of a tile.
        keys: keys of a tile.
        channels: channels of a head, padded to what tl.dot takes.
        warps: warps of the program that owns it.
        stages: loop iterations whose loads are in flight at once.
    """

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


def choose_tile(queries: int, keys: int, d: int, dtype: torch.dtype) -> Tile:
    """The tile for that many queries and keys of ``d`` channels, the same for forward and backward.

    64 x 64 keeps the scores, their gradient and the accumulators of a program in the registers of four
    warps, fills an instruction of Hopper's tensor cores, and divides windows of 8, 16, 24 and 32 tokens a
    side evenly. Wider types and heads take as much room with fewer tokens. Smaller problems get smaller
    tiles, down to the 16 that tl.dot takes. The sizes are powers of two, so that few kernels are compiled
    however many image sizes come.
    """
    channels = max(16, triton.next_power_of_2(d))
    most = {2: 64, 4: 64 if channels <= 32 else 32, 8: 32 if channels <= 64 else 16}[dtype.itemsize]
    side_q, side_k = (min(most, max(16, triton.next_power_of_2(n))) for n in (queries, keys))
    return Tile(side_q, side_k, channels, warps=4, stages=2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over ``dtype`` are kept."""
    return torch.promote_types(dtype, torch.float32)


def last_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if the channels of a token are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_of(x: Tensor):
    """A context in which kernels are launched on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def dot(a, b):
    """Matrix product, summed in float32, or in float64 for float64.

    float32 operands are split into three products of tensor cores ('tf32x3'): 22 bits of each operand's 24
    take part, so that results agree with float32 to rounding, at several times the speed of the fused
    multiply-adds that 'ieee' compiles to.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision='tf32x3')
    else:
        return tl.dot(a, b)
