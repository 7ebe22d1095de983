"""Attention within windows: GC ViT's local and global blocks, DAT's local blocks, mmdet's Swin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmattn.attention import LocalDetails
from mmattn.attention.window import select_windows, window_tokens

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
    """Attention that each token gets, relative to an even share.

    The mean over the queries that may look at it: 1 is a token like any other, 3 one that gets
    three times as much.

    Returns:
        float32 (heads, H, W), from 0 to the number of tokens of a window.
    """
    with torch.no_grad():
        weights, keys = window_details(block)
        weights = weights[0]  # (heads, n, N)
        may_look = weights > MASKED
        relative = weights * may_look.sum(2, keepdim=True)
        count = block.size[0] * block.size[1]
        # The padding is collected in one place behind the map.
        index = keys.where(keys >= 0, count).expand_as(weights).flatten(1)
        total, looks_at = (
            weights.new_zeros(len(weights), count + 1).scatter_add_(1, index, part.flatten(1))
            for part in (relative * may_look, may_look.to(weights.dtype))
        )
        received = (total / looks_at.clamp(min=1))[:, :-1]
        return received.unflatten(1, block.size).float().cpu().numpy()


def chosen_window(block: Block, query: tuple[int, int]) -> ChosenWindow:
    """The window that holds a token, and the attention within it.

    Args:
        block: of :func:`mmattn.visualization.capture`, with window attention.
        query: (row, column) in tokens.
    """
    with torch.no_grad():
        token = tokens_of(block, [query])
        own, keys = window_details(block, token)
        inside = keys[0] >= 0
        members = keys[0][inside]
        mean = window_details(block, members).weights[0].mean(1)
    places = members.cpu().numpy()
    rows = np.unique(places // block.size[1])
    side = (len(rows), len(places) // len(rows))
    columns = places.reshape(side)[0] % block.size[1]
    rows = places.reshape(side)[:, 0] // block.size[1]

    def crop(weights: Tensor) -> np.ndarray:
        return weights[:, inside].float().cpu().numpy().reshape(-1, *side)

    return ChosenWindow(rows, columns, crop(own[0, :, 0]), crop(mean))


def window_details(block: Block, tokens: Tensor | None = None) -> LocalDetails:
    """Attention of some tokens of the map, or of all, to their windows."""
    if hasattr(block.module, 'details'):
        return block.module.details(*block.inputs, queries=tokens)
    return _swin_details(block, tokens)


def _swin_details(block: Block, tokens: Tensor | None) -> LocalDetails:
    """Attention weights of mmdet's ShiftWindowMSA, caught at its dropout."""
    seen = []
    module = block.module
    dropout: nn.Module = module.w_msa.attn_drop
    handle = dropout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        module(*block.inputs)
    finally:
        handle.remove()
    weights = seen[0][None]  # (1, windows, heads, N, N)
    layout = window_tokens(*block.size, module.window_size, module.shift_size).to(weights.device)
    if tokens is None:
        tokens = torch.arange(block.size[0] * block.size[1], device=weights.device)
    return select_windows(weights, layout, tokens)
