"""Small parts that more than one backbone is made of."""

from .channel_norm import ChannelNorm
from .mlp import Mlp
from .relative_position import relative_position_bias, relative_position_index

__all__ = ['ChannelNorm', 'Mlp', 'relative_position_bias', 'relative_position_index']
