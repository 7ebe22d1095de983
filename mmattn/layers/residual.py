"""The residual connection of a transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledResidual(nn.Module):
    """``x + gamma * branch``, where the branch is left out for whole samples at random in training.

    Stochastic depth (arXiv 1603.09382): a sample keeps its branch with probability ``1 - rate``, divided by it.
    The map is passed over once: the sum and all factors are one operation.

    Args:
        rate: of stochastic depth, in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.drops = rate > 0
        # A tensor: compiled blocks that differ in their rate alone are then one program.
        self.register_buffer('keep', torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C), and a scale (C,) if the branch has one -> (B, H, W, C)."""
        if self.training and self.drops:
            chance = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=self.keep.dtype)
            factor = ((chance < self.keep) / self.keep).to(x.dtype)
            gamma = factor if gamma is None else factor * gamma
        return x + branch if gamma is None else torch.addcmul(x, branch, gamma)

    def extra_repr(self) -> str:
        return f'rate={self.rate}'
