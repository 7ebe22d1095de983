"""Attention within windows: GC ViT's local and global blocks, DAT's local ones, mmdet's Swin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .capture import Block, tokens_of

# Shifted windows mask by adding -100 to the scores: what is left of an attention lies below.
MASKED = 1e-30


class ChosenWindow(NamedTuple):
    """One window of a block.

    Attributes:
        rows: (h,), rows of the map that it covers, in tokens; padding is left out.
        columns: (w,), its columns.
        weights: float32 (heads, h, w): the attention of the query to each of its tokens.
        mean_weights: float32 (heads, h, w): the mean over all its queries.
    """

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    mean_weights: np.ndarray


def received_attention(block: Block) -> np.ndarray:
    """How much attention each token gets, over what it would get if all that a query may look at got the same.

    The mean over the queries of its window that may look at it: 1 is a token like any other, 3 one that is looked at
    three times as much.

    Returns:
        float32 (heads, H, W), from 0 to the number of tokens of a window.
    """
    with torch.no_grad():
        weights = window_weights(block)[0]  # (windows, heads, N, N)
        layout = _layout(block)
        # Queries in the padding are cropped from the result, so they do not count.
        may_look = (weights > MASKED) & (layout >= 0)[:, None, :, None]
        over_average = weights * may_look.sum(3, keepdim=True)
        share = (over_average * may_look).sum(2) / may_look.sum(2).clamp(min=1)
        received = share.new_zeros(block.num_heads, block.size[0] * block.size[1])
        inside = layout >= 0
        received[:, layout[inside]] = share.transpose(1, 2)[inside].T
        return received.unflatten(1, block.size).float().cpu().numpy()


def chosen_window(block: Block, query: tuple[int, int]) -> ChosenWindow:
    """The window that holds a token, and what is attended in it.

    Args:
        block: of :func:`mmattn.visualization.capture`, with window attention.
        query: (row, column) in tokens.
    """
    token = tokens_of(block, [query])
    with torch.no_grad():
        layout = _layout(block)
        ((window, row),) = (layout == token).nonzero().tolist()
        weights = window_weights(block)[0, window]
    places = layout[window]
    inside = (places >= 0).cpu().numpy()
    side = round(len(inside) ** 0.5)
    grid = inside.reshape(side, side)
    height, width = grid.any(1).sum(), grid.any(0).sum()
    flat = places.cpu().numpy()[inside].reshape(height, width)
    rows, columns = flat[:, 0] // block.size[1], flat[0] % block.size[1]

    def crop(share):
        return share.float().cpu().numpy()[:, inside].reshape(-1, height, width)

    mean = weights[:, torch.from_numpy(inside)].mean(1)
    return ChosenWindow(rows, columns, crop(weights[:, row]), crop(mean))


def looks(block: Block, tokens: Tensor) -> Tensor:
    """Row-major queries (n,) -> their attention to all tokens, (n, heads, H, W)."""
    weights, layout = window_weights(block)[0], _layout(block)
    place = (layout.flatten() == tokens[:, None]).int().argmax(1)
    window, row = place // layout.shape[1], place % layout.shape[1]
    shares = weights[window, :, row]  # (n, heads, N)
    keys = layout[window].unsqueeze(1).expand_as(shares)
    height, width = block.size
    # The padding goes to one place behind the map.
    out = shares.new_zeros(*shares.shape[:2], height * width + 1)
    out.scatter_(2, keys.where(keys >= 0, height * width), shares)
    return out[..., :-1].unflatten(2, block.size)


def window_weights(block: Block) -> Tensor:
    """(1, windows, heads, N, N), query first, through the module's own way."""
    module = block.module
    return module.weights(*block.inputs) if hasattr(module, 'weights') else _swin_weights(block)


def _swin_weights(block: Block) -> Tensor:
    """What mmdet's ShiftWindowMSA multiplies its values with: its dropout of them sees it, once run again."""
    seen = []
    dropout: nn.Module = block.module.w_msa.attn_drop
    handle = dropout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        block.module(*block.inputs)
    finally:
        handle.remove()
    return seen[0][None]


def _layout(block: Block) -> Tensor:
    module = block.module
    shift = getattr(module, 'shift', getattr(module, 'shift_size', 0))
    return window_tokens(*block.size, module.window_size, shift).to(block.inputs[0].device)


def window_tokens(height: int, width: int, window_size: int, shift: int = 0) -> Tensor:
    """Which token of the map stands at each place of each window; -1: padding.

    Returns:
        Row-major indices, int64 (windows, window_size**2), windows and places row-major too.
    """
    padded = [side + -side % window_size for side in (height, width)]
    tokens = torch.full(padded, -1)
    tokens[:height, :width] = torch.arange(height * width).view(height, width)
    tokens = tokens.roll((-shift, -shift), (0, 1))
    windows = tokens.unflatten(1, (-1, window_size)).unflatten(0, (-1, window_size))
    return windows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
