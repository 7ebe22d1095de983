"""The backbones, one file a paper; importing registers them in mmengine's ``MODELS``."""

from .gcvit import GCViT

__all__ = ['GCViT']
