"""The attention mechanisms as modules for anybody's networks: maps in, maps out."""

from .deformable import DeformableAttention, DeformableAttentionDetails
from .neighborhood import NeighborhoodAttention
from .quadtree import KeptKeys, QuadTreeAttention, quadtree_attention
from .window import GlobalWindowAttention, WindowAttention

__all__ = [
    'DeformableAttention',
    'DeformableAttentionDetails',
    'GlobalWindowAttention',
    'KeptKeys',
    'NeighborhoodAttention',
    'QuadTreeAttention',
    'WindowAttention',
    'quadtree_attention',
]
