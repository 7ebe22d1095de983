"""Training: hooks and strategies for mmengine's Runner; importing registers the hooks."""

from .hooks import InvalidLossHook, IterationSeedHook

__all__ = ['InvalidLossHook', 'IterationSeedHook']
