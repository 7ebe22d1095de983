"""The backbones, one file a paper; importing them registers them in mmengine's ``MODELS``."""

from .dat import DAT
from .gcvit import GCViT
from .quadtree import QuadTree

__all__ = ['DAT', 'GCViT', 'QuadTree']
