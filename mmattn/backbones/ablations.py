"""Alternatives that the papers' tables compare with, on (B, H, W, C)."""

from __future__ import annotations

from mmcv.cnn.bricks.transformer import PatchMerging
from torch import Tensor, nn

from mmattn.layers import channel_last


class MaxPoolDownsample(nn.Module):
    """Convolution and max pooling (GC ViT, table 8).

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), out_dim)."""
        return self.norm(channel_last(lambda image: self.pool(self.conv(image)), x))


class PatchMergingDownsample(PatchMerging):
    """Swin's patch merging (GC ViT, table 8).

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), out_dim)."""
        tokens, size = super().forward(x.flatten(1, 2), x.shape[1:3])
        return tokens.reshape(tokens.shape[0], *size, tokens.shape[2])
