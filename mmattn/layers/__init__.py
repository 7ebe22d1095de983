"""Small parts that more than one backbone is made of."""

from .mlp import Mlp
from .relative_position import relative_position_bias, relative_position_index

__all__ = ['Mlp', 'relative_position_bias', 'relative_position_index']
