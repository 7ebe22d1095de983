"""Triton kernels of window and deformable attention; importing this needs triton."""

from .window_attention import window_attention_backward, window_attention_forward

__all__ = ['window_attention_backward', 'window_attention_forward']
