"""Hooks and strategies for mmengine's Runner, and parts that the command-line tools share."""

from .complexity import register_flops
from .hooks import InvalidLossHook, IterationSeedHook

__all__ = ['InvalidLossHook', 'IterationSeedHook']

register_flops()
