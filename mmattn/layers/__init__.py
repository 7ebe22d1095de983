"""Small parts that more than one backbone is made of."""

from .channel_norm import ChannelNorm
from .mlp import Mlp
from .relative_position import relative_position_bias, relative_position_index
from .residual import ScaledResidual

__all__ = [
    'ChannelNorm',
    'Mlp',
    'ScaledResidual',
    'relative_position_bias',
    'relative_position_index',
]
