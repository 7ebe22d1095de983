"""Neighbourhood attention (NAT, arXiv 2204.07143) as a module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.ops import neighborhood_attention, neighborhood_attention_weights


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of each token to its kernel_size x kernel_size nearest ones.

    Maps of any size: one smaller than the kernel is completed with zero tokens, which are
    attended like others (their key and value are the projection's bias).

    Args:
        dim: channels C of the map.
        num_heads: heads; each has C / num_heads channels.
        kernel_size: odd side of the neighbourhood in tokens.

    Raises:
        ValueError: dim is no multiple of num_heads, or kernel_size is not odd and positive.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f'dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}'
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), channel-last."""
        height, width = x.shape[1:3]
        q, k, v = self.project(x)
        out = neighborhood_attention(q, k, v, self.rpb, self.kernel_size, self.scale)
        return self.proj(out.flatten(-2).narrow(1, 0, height).narrow(2, 0, width))

    def weights(self, x: Tensor) -> Tensor:
        """What :meth:`forward` looks at for the same map, (B, H, W, heads, kernel_size**2).

        A query's keys are row-major; their window is the one around it, moved into the map (completed to the kernel's
        size, where it is smaller).
        """
        height, width = x.shape[1:3]
        q, k, _ = self.project(x)
        weights = neighborhood_attention_weights(q, k, self.rpb, self.kernel_size, self.scale)
        return weights[:, :height, :width]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, W, heads, d) of the map, no side smaller than the kernel."""
        bottom, right = (torch.sym_max(0, self.kernel_size - side) for side in x.shape[1:3])
        if torch.compiler.is_exporting() or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
