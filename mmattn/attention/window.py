"""Window self-attention with a relative position bias, local (Swin) and global (GC ViT, arXiv 2206.09959)."""

import torch
from torch import Tensor, nn

from mmattn.layers import relative_position_bias, relative_position_index
from mmattn.ops import window_attention, window_attention_weights


class _RelativePositionWindows(nn.Module):
    """What local and global window attention share: the projections and the bias table."""

    def __init__(self, dim: int, num_heads: int, window_size: int, num_projections: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f'dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}'
            )
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size}')
        self.num_heads = num_heads
        self.window_size = window_size
        self.num_projections = num_projections
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index = relative_position_index(window_size)
        self.register_buffer('relative_position_index', index, persistent=False)
        self.qkv = nn.Linear(dim, num_projections * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(B, H, W, C) -> each projection of the map, (B, H, W, heads, d), and of a zero token, (heads, d)."""
        heads = (self.num_projections, self.num_heads, -1)
        return self.qkv(x).unflatten(-1, heads).unbind(-3), self.qkv.bias.view(heads).unbind(0)

    def bias(self) -> Tensor:
        """(heads, N, N)."""
        return relative_position_bias(
            self.relative_position_bias_table, self.relative_position_index
        )


class WindowAttention(_RelativePositionWindows):
    """Multi-head self-attention within the windows of a map, every token with its own query.

    Maps of any size: the last windows are completed with zero tokens, which are attended like others (their
    key and value are the projection's bias), as Swin and GC ViT do it.

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        window_size: side of a window in tokens.
        shift: by how many tokens the windows are shifted cyclically (Swin: window_size // 2); what lies on
            opposite borders of the map is then kept apart by a mask. 0: not at all.

    Raises:
        ValueError: dim is no multiple of num_heads, or window_size or shift is out of range.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int = 0):
        super().__init__(dim, num_heads, window_size, num_projections=3)
        if not 0 <= shift < window_size:
            raise ValueError(f'shift must be in [0, {window_size}), got {shift}')
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), channel-last."""
        (q, k, v), (_, pad_k, pad_v) = self.project(x)
        out = window_attention(q, k, v, self.bias(), self.window_size, self.shift, pad_k, pad_v)
        return self.proj(out.flatten(-2))

    def weights(self, x: Tensor) -> Tensor:
        """What :meth:`forward` looks at for the same map, (B, windows, heads, N, N), query first.

        Windows and their N tokens are row-major, and hold the map's padding; with a shift, the first window starts
        ``shift`` tokens down and right.
        """
        (q, k, _), (_, pad_k, _) = self.project(x)
        return window_attention_weights(q, k, self.bias(), self.window_size, self.shift, pad_k)


class GlobalWindowAttention(_RelativePositionWindows):
    """Attention of GC ViT's global query to the keys and values of each window (section 3.3, equation 4).

    The query is made once for the whole image and shared by all its windows; keys and values are projected
    from the map.

    Args:
        dim: channels C of the map and of the query.
        num_heads: heads; head h owns channels h*C/num_heads .. (h+1)*C/num_heads - 1, in the query too.
        window_size: side of a window in tokens.

    Raises:
        ValueError: dim is no multiple of num_heads, or window_size is out of range.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__(dim, num_heads, window_size, num_projections=2)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """Map (B, H, W, C) and global query (B, window_size, window_size, C) -> (B, H, W, C), channel-last."""
        (k, v), (pad_k, pad_v) = self.project(x)
        q = query.to(k.dtype).unflatten(-1, (self.num_heads, -1))
        out = window_attention(q, k, v, self.bias(), self.window_size, pad_k=pad_k, pad_v=pad_v)
        return self.proj(out.flatten(-2))

    def weights(self, x: Tensor, query: Tensor) -> Tensor:
        """What :meth:`forward` looks at for the same inputs; as :meth:`WindowAttention.weights`."""
        (k, _), (pad_k, _) = self.project(x)
        q = query.to(k.dtype).unflatten(-1, (self.num_heads, -1))
        return window_attention_weights(q, k, self.bias(), self.window_size, pad_k=pad_k)
