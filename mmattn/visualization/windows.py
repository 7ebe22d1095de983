"""Window attention: GC ViT's local and global blocks, DAT's local blocks, mmdet's Swin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmattn.attention import LocalDetails
from mmattn.attention.window import select_windows, window_tokens

from .capture import Block, tokens_of

# Shifted windows mask by adding -100 to the scores: attention below this counts as masked.
MASKED = 1e-30


class ChosenWindow(NamedTuple):
    """One window of a block.

    Attributes:
        rows: (h,), rows of the map that it covers, in tokens, without padding.
        columns: (w,), columns of the map that it covers.
        weights: float32 (heads, h, w), attention of the query to each token of the window.
        mean_weights: float32 (heads, h, w), mean attention of all queries of the window.
    """

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    mean_weights: np.ndarray


def received_attention(block: Block) -> np.ndarray:
    """Attention that each token receives, relative to uniform attention.

    The mean over the queries that can attend to the token: 1 is average, 3 is three times as much.

    Returns:
        float32 (heads, H, W), from 0 to the number of tokens of a window.
    """
    with torch.no_grad():
        weights, keys = window_details(block)
        weights = weights[0]  # (heads, n, N)
        visible = weights > MASKED
        relative = weights * visible.sum(2, keepdim=True)
        count = block.size[0] * block.size[1]
        # Padding is collected at one extra index after the map.
        index = keys.where(keys >= 0, count).expand_as(weights).flatten(1)
        total, num_queries = (
            weights.new_zeros(len(weights), count + 1).scatter_add_(1, index, part.flatten(1))
            for part in (relative * visible, visible.to(weights.dtype))
        )
        received = (total / num_queries.clamp(min=1))[:, :-1]
        return received.unflatten(1, block.size).float().cpu().numpy()


def chosen_window(block: Block, query: tuple[int, int]) -> ChosenWindow:
    """The window that contains a token, with its attention.

    Args:
        block: from :func:`mmattn.visualization.capture`, with window attention.
        query: (row, column) in tokens.

    Raises:
        ValueError: the query is outside the map.
    """
    with torch.no_grad():
        token = tokens_of(block, [query])
        weights, keys = window_details(block, token)
        inside = keys[0] >= 0
        members = keys[0][inside]
        mean = window_details(block, members).weights[0].mean(1)
    indices = members.cpu().numpy()
    height = len(np.unique(indices // block.size[1]))
    indices = indices.reshape(height, -1)
    rows, columns = indices[:, 0] // block.size[1], indices[0] % block.size[1]

    def crop(weights: Tensor) -> np.ndarray:
        return weights[:, inside].float().cpu().numpy().reshape(-1, *indices.shape)

    return ChosenWindow(rows, columns, crop(weights[0, :, 0]), crop(mean))


def window_details(block: Block, tokens: Tensor | None = None) -> LocalDetails:
    """Attention of row-major tokens (n,) of the map, or of all, to their windows."""
    if hasattr(block.module, 'details'):
        return block.module.details(*block.inputs, queries=tokens)
    return _swin_details(block, tokens)


def _swin_details(block: Block, tokens: Tensor | None) -> LocalDetails:
    """Attention of mmdet's ShiftWindowMSA, recorded at its attention dropout."""
    seen: list[Tensor] = []
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
