"""The attention mechanisms as modules for anybody's networks: maps in, maps out."""

from .window import GlobalWindowAttention, WindowAttention

__all__ = ['GlobalWindowAttention', 'WindowAttention']
