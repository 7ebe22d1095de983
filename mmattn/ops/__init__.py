"""The operators that the attention modules stand on, as plain functions with their literal definitions."""

from .flops import count_fused_attention_on_cpu
from .window import window_attention, window_attention_flops, window_attention_reference

__all__ = ['window_attention', 'window_attention_flops', 'window_attention_reference']

count_fused_attention_on_cpu()
