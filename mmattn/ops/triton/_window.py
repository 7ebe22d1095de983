"""Tiles of window attention in Triton: launches, indices, loads and scores.

Padding, shift and partition are index arithmetic: a program computes where each token of its window
is in the map, and reads the padding's key and value for those that are outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, choose_tile, dot, load_tokens

# Programs that share the windows of a batch, where one program handles several: enough to fill the
# multiprocessors of a large GPU several times; fixed, so that sums have one order on every GPU.
_PROGRAMS = 1024

# As in mmattn.ops.window, which cannot be imported here: it loads this package.
SHIFT_MASK = tl.constexpr(-100.0)


class WindowLaunch:
    """Sizes and constants of all kernels of one call.

    Attributes:
        windows: windows of the batch.
        tiles: tiles of a window's queries, and of its keys.
        share: windows that one program goes through, where programs go through several.
        parts: shares into which the windows are divided.
        query_parts: parts of an image in which the gradient of a shared query is summed.
        pad_parts: parts in which the gradients of the padding are.
    """

    def __init__(self, q: Tensor, k: Tensor, window_size: int, shift: int) -> None:
        batch, height, width, self.heads, d = k.shape
        n = window_size**2
        per_image = triton.cdiv(height, window_size) * triton.cdiv(width, window_size)
        self.windows = batch * per_image
        tile = choose_tile(n, n, d, q.dtype, gathers=False)
        self.tiles = triton.cdiv(n, tile.own)
        self.sizes = (batch, height, width, self.heads)
        shared = q.shape[1:3] != k.shape[1:3]
        # A program that sums a shared query's gradient stays within the image.
        joined = per_image if shared and self.tiles == 1 else self.windows
        groups = self.windows // joined
        wanted = triton.cdiv(_PROGRAMS, self.heads * self.tiles**2 * groups)
        self.share = triton.cdiv(joined, min(joined, wanted))
        self.parts = groups * triton.cdiv(joined, self.share)
        if self.tiles == 1:
            self.query_parts, self.pad_parts = self.parts // groups, self.parts
        else:
            self.query_parts, self.pad_parts = per_image, self.windows * self.tiles
        self.constants = dict(
            WINDOW=window_size,
            SHIFT=shift,
            SHARED_QUERY=shared,
            D=d,
            BLOCK_D=tile.channels,
            BLOCK=tile.own,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def bias(self, bias: Tensor) -> Tensor:
        """The bias, or its transpose, times LOG2E, rows padded to whole tiles with -inf.

        Keys beyond the window get no weight, and rows of odd windows are aligned for wide loads.
        """
        beyond = self.tiles * self.constants['BLOCK'] - bias.shape[2]
        return F.pad(bias * LOG2E.value, (0, beyond), value=float('-inf')).contiguous()

    def run(self, kernel: Any, programs: int, *arguments: Any) -> None:
        """Run that many programs of a kernel for each head."""
        kernel[(programs * self.heads,)](*arguments, **self.constants)

    @staticmethod
    def strided(*maps: Tensor) -> Iterator[Any]:
        """Each map followed by its strides of image, row, column and head."""
        for x in maps:
            yield from (x, x.stride()[:4])


def heads_of(*tokens: Tensor) -> Iterator[Any]:
    """Each tensor (heads, d) followed by its stride of heads."""
    for x in tokens:
        yield from (x, x.stride(0))


@triton.jit
def program(tiles, batch, height, width, WINDOW: tl.constexpr):
    """Head, tile and window (counted through the batch) of this program.

    The tile changes first and the head last: programs that run at once share the tokens of few
    windows and the bias of one head.
    """
    windows = batch * tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return pair // windows, tile, pair % windows


@triton.jit
def _window(index, height, width, WINDOW: tl.constexpr):
    """Image, row and column of a window, and height and width of the padded map in tokens."""
    window_rows, window_columns = tl.cdiv(height, WINDOW), tl.cdiv(width, WINDOW)
    column = index % window_columns
    row = (index // window_columns) % window_rows
    image = index // (window_columns * window_rows)
    return image.to(tl.int64), row, column, window_rows * WINDOW, window_columns * WINDOW


@triton.jit
def place(n, index, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Image, row and column of token n of a window; if it is inside the map; its shift region.

    Padding, and n beyond the window, is not inside.
    """
    image, row, column, rows, columns = _window(index, height, width, WINDOW)
    y, x = row * WINDOW + n // WINDOW, column * WINDOW + n % WINDOW
    region = 2 * (y >= rows - SHIFT).to(tl.int32) + (x >= columns - SHIFT).to(tl.int32)
    y, x = y + SHIFT, x + SHIFT
    y, x = tl.where(y >= rows, y - rows, y), tl.where(x >= columns, x - columns, x)
    inside = (n < WINDOW * WINDOW) & (y < height) & (x < width)
    return image, y.to(tl.int64), x.to(tl.int64), inside, region


@triton.jit
def rows(x, strides, image, row, column, head):
    """Addresses of the tokens of a map at (row, column)."""
    x += image * strides[0] + head.to(tl.int64) * strides[3]
    return x + row * strides[1] + column * strides[2]


@triton.jit
def query_rows(q, strides, image, n, y, x, head, WINDOW: tl.constexpr, SHARED_QUERY: tl.constexpr):
    """Addresses of the queries of a window's tokens n, which are at (y, x) of the map."""
    if SHARED_QUERY:
        y, x = (n // WINDOW).to(tl.int64), (n % WINDOW).to(tl.int64)
    return rows(q, strides, image, y, x, head)


@triton.jit
def load_bias(bias, head, row, column, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile of :meth:`WindowLaunch.bias`.

    Rows beyond the window repeat the last one; results of such tokens are not stored.
    """
    N: tl.constexpr = WINDOW * WINDOW
    ROW: tl.constexpr = tl.cdiv(N, BLOCK) * BLOCK
    return tl.load(bias + (head * N + tl.minimum(row, N - 1)) * ROW + column)


@triton.jit
def load_keys(
    k, k_strides, v, v_strides, pad_k, pad_k_stride, pad_v, pad_v_stride,
    image, n, y, x, inside, head,
    WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load keys and values of a window's tokens n, at (y, x); the padding's if not inside.

    The address is selected, not the value, so that tiles reach shared memory without registers.
    """
    k_rows = tl.where(inside, rows(k, k_strides, image, y, x, head), pad_k + head * pad_k_stride)
    v_rows = tl.where(inside, rows(v, v_strides, image, y, x, head), pad_v + head * pad_v_stride)
    valid = n < WINDOW * WINDOW
    return load_tokens(k_rows, valid, D, BLOCK_D), load_tokens(v_rows, valid, D, BLOCK_D)


@triton.jit
def masked_scores(a, b, bias, region_a, region_b, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Scores of tokens a (down) with tokens b (across), times LOG2E, with bias and shift mask."""
    scores = dot(a, tl.trans(b)) * (SCALE * LOG2E) + bias
    if SHIFT > 0:
        scores += tl.where(region_a[:, None] == region_b[None, :], 0.0, SHIFT_MASK * LOG2E)
    return scores
