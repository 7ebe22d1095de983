"""Triton kernels of window and deformable attention; importing this needs triton."""

import torch

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
    """Make these the operators' kernels for a device: 'CUDA', or 'CPU' where Triton only interprets them."""
    for name, kernel in {
        'deform_attention': deform_attention_forward,
        'deform_attention_backward': _deform_attention_backward,
        'window_attention': window_attention_forward,
        'window_attention_backward': _window_attention_backward,
    }.items():
        torch.library.impl(f'mmattn::{name}', device)(kernel)


def _window_attention_backward(grad, q, k, v, bias, pad_k, pad_v, window_size, shift, out, lse):
    return window_attention_backward(
        grad, q, k, v, bias, pad_k, pad_v, out, lse, window_size, shift
    )


def _deform_attention_backward(grad, q, k, v, table, query_grid, key_positions, scale, out, lse):
    """The gradients by table and positions come from a kernel of their own, in CUDA."""
    forward = (q, k, v, table, query_grid, key_positions, out, lse, scale)
    by_position = torch.ops.mmattn.deform_bias_backward(grad, *forward)
    return (*deform_attention_backward(grad, *forward), *by_position)
