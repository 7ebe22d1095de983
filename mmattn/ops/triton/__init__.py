"""Triton kernels of window and deformable attention; importing this needs triton."""

from .deform_attention import deform_attention_backward, deform_attention_forward
from .window_attention import window_attention_backward, window_attention_forward

__all__ = [
    'deform_attention_backward',
    'deform_attention_forward',
    'window_attention_backward',
    'window_attention_forward',
]
