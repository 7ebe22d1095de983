"""The operators that the attention modules stand on, as plain functions with their literal definitions."""

from .window import window_attention, window_attention_flops, window_attention_reference

__all__ = ['window_attention', 'window_attention_flops', 'window_attention_reference']
