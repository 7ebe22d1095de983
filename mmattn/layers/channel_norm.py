"""LayerNorm over the channels of a channel-first map."""

from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over C of (B, C, H, W), between convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
