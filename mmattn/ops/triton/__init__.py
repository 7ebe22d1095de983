"""Triton kernels of window and deformable attention; importing this needs triton."""

from collections.abc import Callable

import torch
from torch import Tensor

from .deform_attention import deform_attention_backward, deform_attention_forward
from .window_backward import window_attention_backward
from .window_forward import window_attention_forward

__all__ = [
    'deform_attention_backward',
    'deform_attention_forward',
    'register',
    'window_attention_backward',
    'window_attention_forward',
]


def register(device: str) -> None:
    """Register the kernels for a device: 'CUDA', or 'CPU' if Triton interprets them."""
    kernels: dict[str, Callable[..., object]] = {
        'deform_attention': deform_attention_forward,
        'deform_attention_backward': _deform_attention_backward,
        'window_attention': window_attention_forward,
        'window_attention_backward': _window_attention_backward,
    }
    for name, kernel in kernels.items():
        torch.library.impl(f'mmattn::{name}', device)(kernel)


def _window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_k: Tensor,
    pad_v: Tensor,
    window_size: int,
    shift: int,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    inputs = (q, k, v, bias, pad_k, pad_v)
    return window_attention_backward(grad, *inputs, out, lse, window_size, shift)


def _deform_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    query_grid: Tensor,
    key_positions: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients, those by table and positions from the CUDA kernel."""
    forward = (q, k, v, table, query_grid, key_positions, out, lse, scale)
    by_position = torch.ops.mmattn.deform_bias_backward(grad, *forward)
    return (*deform_attention_backward(grad, *forward), *by_position)
