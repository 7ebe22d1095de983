"""The backbones, one file a paper; importing registers them in mmengine's ``MODELS``."""

from .dat import DAT
from .gcvit import GCViT

__all__ = ['DAT', 'GCViT']
