"""Small layers shared by backbones and attention modules; maps are channel-last, (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.ops import known_equal


def channel_last(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a channel-first module, such as a convolution, to a map (B, H, W, C)."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pad_to_multiple(x: Tensor, multiple: int, mode: str = 'constant') -> Tensor:
    """Pad a map at the bottom and at the right until ``multiple`` divides its sides.

    Args:
        x: (B, H, W, C).
        multiple: divisor of the sides.
        mode: of :func:`torch.nn.functional.pad`: 'constant' (zeros) or 'replicate'.

    Returns:
        (B, H', W', C); the map itself if its sides divide.
    """
    bottom, right = (((side - 1) // multiple + 1) * multiple - side for side in x.shape[1:3])
    if known_equal(bottom, 0) and known_equal(right, 0):
        return x
    if mode == 'constant':
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return channel_last(lambda image: F.pad(image, (0, right, 0, bottom), mode=mode), x)


class ChannelFirst(nn.Module):
    """A map (B, H, W, C) as (B, C, H, W), also in memory."""

    def forward(self, x: Tensor) -> Tensor:
        # mmcv's operators read memory in this order, whatever the strides.
        return x.permute(0, 3, 1, 2).contiguous()


class ConvNorm(nn.Module):
    """Strided convolution and LayerNorm: stems, patch embeddings and downsamplers.

    Non-overlapping patches (kernel size equal to the stride) are completed with zeros.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
        kernel_size: side of the kernel in cells.
        stride: of the convolution.
        bias: of the convolution.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, bias: bool = True):
        super().__init__()
        padding = 0 if kernel_size == stride else kernel_size // 2
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out_dim)
        self.patch = stride if kernel_size == stride else 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        return self.norm(channel_last(self.conv, pad_to_multiple(x, self.patch)))


class Mlp(nn.Module):
    """Linear, exact GELU, linear over the last dimension.

    Args:
        dim: channels of input and output.
        hidden_dim: channels in between.

    Attributes:
        recompute: store the input of the GELU alone and recompute its output in backward; set by
            :func:`recompute_gelu`.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.activate_and_project(self.fc1(x))

    def activate_and_project(self, hidden: Tensor) -> Tensor:
        """(..., hidden_dim) -> (..., dim): GELU and the second linear layer."""
        if self.recompute and hidden.requires_grad and not torch.compiler.is_compiling():
            return _project_recomputed(self.act, self.fc2, hidden)
        return self.fc2(self.act(hidden))


class ConvMlp(Mlp):
    """MLP with a depthwise 3 x 3 convolution before the GELU, on (B, H, W, C).

    Args:
        dim: channels of input and output.
        hidden_dim: channels in between.
        residual: add the convolution's input to its output (DAT++).
    """

    def __init__(self, dim: int, hidden_dim: int, residual: bool):
        super().__init__(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = self.fc1(x)
        convolved = channel_last(self.dwconv, x)
        return self.activate_and_project(x + convolved if self.residual else convolved)


def recompute_gelu(model: nn.Module) -> int:
    """Let every :class:`Mlp` of a model recompute its GELU in backward: less memory, same numbers.

    The GELU's output is the largest activation of a block. Not for blocks that are recomputed as a
    whole (``with_cp``, ``torch.utils.checkpoint``): these would store more than before.

    Args:
        model: any model that holds such layers; it is changed in place.

    Returns:
        How many MLPs were changed.

    Raises:
        ValueError: a backbone in the model has ``with_cp``.
    """
    if any(getattr(module, 'with_cp', False) for module in model.modules()):
        raise ValueError(
            'model must not have with_cp: its blocks are recomputed as a whole already'
        )
    mlps = [module for module in model.modules() if isinstance(module, Mlp)]
    for mlp in mlps:
        mlp.recompute = True
    return len(mlps)


def _project_recomputed(act: nn.Module, fc2: nn.Module, hidden: Tensor) -> Tensor:
    """``fc2(act(hidden))``, storing ``hidden`` in place of every view of ``act(hidden)``."""
    activated = act(hidden)
    storage = activated.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor | tuple:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return act(hidden).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return fc2(activated)


class ScaledResidual(nn.Module):
    """Residual connection ``x + gamma * branch`` with stochastic depth (arXiv 1603.09382).

    In training a sample keeps its branch with probability ``1 - rate``, divided by it. Sum and
    factors are one operation: the map is read once.

    Args:
        rate: probability of dropping the branch, in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.drops = rate > 0  # compiled blocks that differ in their rate alone share one program

    def forward(self, x: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) and, if the branch is scaled, gamma (C,) -> (B, H, W, C)."""
        if self.training and self.drops:
            keep = 1.0 - self.rate
            chance = torch.rand(x.shape[0], 1, 1, 1, device=x.device)
            factor = ((chance < keep) / keep).to(x.dtype)
            gamma = factor if gamma is None else factor * gamma
        return x + branch if gamma is None else torch.addcmul(x, branch, gamma)

    def extra_repr(self) -> str:
        return f'rate={self.rate}'


def relative_position_index(window_size: int) -> Tensor:
    """Row of Swin's bias table for each pair of tokens of a window (arXiv 2103.14030).

    Args:
        window_size: side w of the window in tokens.

    Returns:
        int64 (N, N), N = w**2 in row-major order, query first:
        ``(y_q - y_k + w - 1) * (2w - 1) + (x_q - x_k + w - 1)``.
    """
    side = torch.arange(window_size)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing='ij'))
    rows = y[:, None] - y + window_size - 1
    columns = x[:, None] - x + window_size - 1
    return rows * (2 * window_size - 1) + columns


def relative_position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Bias of each head for each pair of tokens.

    Args:
        table: ((2w-1)**2, heads).
        index: (N, N), of :func:`relative_position_index`.

    Returns:
        (heads, N, N), contiguous.
    """
    return table.t().index_select(1, index.flatten()).view(-1, *index.shape)
