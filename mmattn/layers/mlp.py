"""The transformer's MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        # What somebody has put in a layer's place (an adapter, say), or hooked to it, is called as a module.
        plain = _is_plain(self.act, nn.GELU) and _is_plain(self.fc2, nn.Linear)
        if plain and hidden.requires_grad and not torch.compiler.is_exporting():
            return _GeluLinear.apply(hidden, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(hidden))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it would do nothing but what its kind does, as it is built here."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return (
        type(module) is kind and not any(hooks) and getattr(module, 'approximate', 'none') == 'none'
    )


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x), weight, bias)`` of which backward keeps ``x`` and ``weight``.

    torch's checkpoint does the same, for half a millisecond of the host's time a call.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        dtype = grad.dtype  # under autocast not that of the weight
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(dtype)).to(x.dtype), x)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ F.gelu(x).to(dtype).view(-1, x.shape[-1])
        return grad_x, grad_weight, rows.sum(0)
