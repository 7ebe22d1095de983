"""The attention mechanisms as modules for any network; maps are channel-last, (B, H, W, C)."""

from .deformable import DeformableAttention
from .details import DeformableDetails, KeptKeys, LocalDetails, QuadTreeDetails
from .neighborhood import NeighborhoodAttention
from .pyramid import quadtree_attention
from .quadtree import QuadTreeAttention
from .window import GlobalWindowAttention, WindowAttention

__all__ = [
    'DeformableAttention',
    'DeformableDetails',
    'GlobalWindowAttention',
    'KeptKeys',
    'LocalDetails',
    'NeighborhoodAttention',
    'QuadTreeAttention',
    'QuadTreeDetails',
    'WindowAttention',
    'quadtree_attention',
]
