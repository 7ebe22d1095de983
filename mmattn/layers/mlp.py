"""The transformer's MLP."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    """Linear, exact GELU, linear over the last dimension.

    What the GELU gives is worked out again in backward instead of being kept: it is a block's largest map.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.fc1(x))

    def project(self, hidden: Tensor) -> Tensor:
        """(..., hidden_dim) -> (..., dim): GELU and the second linear layer."""
        if hidden.requires_grad and not torch.compiler.is_exporting():
            # Recomputation stops where all is there that backward needs, which is before the product.
            return checkpoint(self._project, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._project(hidden)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(hidden))
