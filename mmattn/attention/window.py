"""Window attention with a relative position bias: local (Swin), global (GC ViT)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmattn.layers import relative_position_bias, relative_position_index
from mmattn.ops import recording, window_attention, window_attention_weights

from .details import LocalDetails
from .heads import check_heads, select_queries


class _WindowAttention(nn.Module):
    """Projections, bias table and window layout of local and global window attention."""

    shift = 0
    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window_size: int, num_projections: int):
        super().__init__()
        check_heads(dim, num_heads)
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size}')
        self.num_heads = num_heads
        self.window_size = window_size
        self.num_projections = num_projections
        self.head_dim = dim // num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index = relative_position_index(window_size)
        self.register_buffer('relative_position_index', index, persistent=False)
        self.register_load_state_dict_post_hook(_materialize_index)
        self.qkv = nn.Linear(dim, num_projections * dim)
        self.proj = nn.Linear(dim, dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _WindowAttention:
        """Move or convert; ``to_empty`` would leave the index, which no file has, undefined."""
        super()._apply(fn, recurse)
        if not self.relative_position_index.is_meta:
            self.relative_position_index.copy_(relative_position_index(self.window_size))
        return self

    def project(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Project the tokens of a map and the zero token that completes its windows.

        Args:
            x: (B, H, W, C).

        Returns:
            Each projection of the map, (B, H, W, heads, d), and of the zero token, (heads, d), or
            None where no window needs it.
        """
        batch, height, width, dim = x.shape
        heads = (self.num_projections, self.num_heads, self.head_dim)
        recorded = recording() or torch.compiler.is_compiling()  # for other sizes, too
        if not recorded and not height % self.window_size and not width % self.window_size:
            projected = self.qkv(x).reshape(batch, height, width, *heads)
            return projected.unbind(-3), (None,) * self.num_projections
        # The zero token rides along: one call of the layer, whatever the layer is.
        tokens = torch.cat([x.reshape(-1, dim), x.new_zeros(1, dim)])
        projected = self.qkv(tokens).reshape(-1, *heads)
        of_map = projected[:-1].reshape(batch, height, width, *heads)
        return of_map.unbind(-3), projected[-1].unbind(0)

    def bias(self) -> Tensor:
        """Relative position bias, (heads, N, N)."""
        return relative_position_bias(
            self.relative_position_bias_table, self.relative_position_index
        )

    def _details(
        self, q: Tensor, k: Tensor, pad_k: Tensor | None, queries: Tensor | None
    ) -> LocalDetails:
        height, width = k.shape[1:3]
        weights = window_attention_weights(
            q, k, self.bias(), self.window_size, self.shift, pad_k
        )  # (B, windows, heads, N, N)
        layout = window_tokens(height, width, self.window_size, self.shift).to(k.device)
        return select_windows(weights, layout, select_queries(queries, height * width, k.device))


def _materialize_index(attention: _WindowAttention, _: object) -> None:
    """Build the index of a module whose weights came by ``load_state_dict(assign=True)``."""
    device = attention.relative_position_bias_table.device
    if attention.relative_position_index.is_meta and device.type != 'meta':
        index = relative_position_index(attention.window_size)
        attention.relative_position_index = index.to(device)


class WindowAttention(_WindowAttention):
    """Multi-head self-attention within windows (Swin, arXiv 2103.14030, section 3.2).

    Maps of any size: the last windows are completed with zero tokens, which take part in attention
    without a mask (their key and value are the projection's bias), as in Swin and GC ViT.

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        window_size: side of a window in tokens.
        shift: tokens by which the windows are shifted cyclically (Swin: window_size // 2; DAT:
            (window_size + 1) // 2); a mask separates opposite borders of the map. 0: no shift.

    Raises:
        ValueError: dim is no multiple of num_heads, or window_size or shift is out of range.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int = 0):
        super().__init__(dim, num_heads, window_size, num_projections=3)
        if not 0 <= shift < window_size:
            raise ValueError(f'shift must be in [0, {window_size}), got {shift}')
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        (q, k, v), (_, pad_k, pad_v) = self.project(x)
        out = window_attention(q, k, v, self.bias(), self.window_size, self.shift, pad_k, pad_v)
        return self.proj(out.flatten(-2))

    def details(self, x: Tensor, queries: Tensor | None = None) -> LocalDetails:
        """Attention of :meth:`forward` for the same map; ``queries`` as in :mod:`.details`."""
        (q, k, _), (_, pad_k, _) = self.project(x)
        return self._details(q, k, pad_k, queries)


class GlobalWindowAttention(_WindowAttention):
    """Attention of GC ViT's global query to the tokens of each window (section 3.3, equation 4).

    The query is made once for the whole image and shared by all its windows; keys and values are
    projected from the map, whose last windows are completed as in :class:`WindowAttention`.

    Args:
        dim: channels C of the map and of the query.
        num_heads: heads; head h owns channels h*C/num_heads .. (h+1)*C/num_heads - 1 of both.
        window_size: side of a window in tokens.

    Raises:
        ValueError: dim is no multiple of num_heads, or window_size is out of range.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__(dim, num_heads, window_size, num_projections=2)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """Map (B, H, W, C), global query (B, window_size, window_size, C) -> (B, H, W, C)."""
        (k, v), (pad_k, pad_v) = self.project(x)
        q = query.to(k.dtype).reshape(*query.shape[:3], self.num_heads, self.head_dim)
        out = window_attention(q, k, v, self.bias(), self.window_size, pad_k=pad_k, pad_v=pad_v)
        return self.proj(out.flatten(-2))

    def details(self, x: Tensor, query: Tensor, queries: Tensor | None = None) -> LocalDetails:
        """Attention of :meth:`forward` for the same inputs; ``queries`` as in :mod:`.details`."""
        (k, _), (pad_k, _) = self.project(x)
        q = query.to(k.dtype).reshape(*query.shape[:3], self.num_heads, self.head_dim)
        return self._details(q, k, pad_k, queries)


def window_tokens(height: int, width: int, window_size: int, shift: int = 0) -> Tensor:
    """Token of the map at each place of each window.

    Returns:
        Row-major indices, int64 (windows, window_size**2), windows and places row-major too; -1 for
        padding. A shifted first window starts ``shift`` tokens down and right.
    """
    padded = [side + -side % window_size for side in (height, width)]
    tokens = torch.full(padded, -1)
    tokens[:height, :width] = torch.arange(height * width).view(height, width)
    tokens = tokens.roll((-shift, -shift), (0, 1))
    windows = tokens.unflatten(1, (-1, window_size)).unflatten(0, (-1, window_size))
    return windows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def select_windows(weights: Tensor, layout: Tensor, queries: Tensor) -> LocalDetails:
    """Attention of some tokens to their windows, out of that of all windows.

    Args:
        weights: (B, windows, heads, N, N), query first.
        layout: (windows, N), of :func:`window_tokens`.
        queries: row-major indices of tokens, int64 (n,).
    """
    flat = layout.flatten()
    inside = (flat >= 0).nonzero().squeeze(1)
    place = torch.empty_like(inside)
    place[flat[inside]] = inside
    window, row = place[queries] // layout.shape[1], place[queries] % layout.shape[1]
    return LocalDetails(weights[:, window, :, row].permute(1, 2, 0, 3), layout[window])
