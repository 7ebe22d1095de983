"""Hooks and strategies for mmengine's Runner, and parts that the command-line tools share."""

from .complexity import register_flops
from .hooks import InvalidLossHook, IterationSeedHook
from .layer_decay import LayerDecayConstructor

__all__ = ['InvalidLossHook', 'IterationSeedHook', 'LayerDecayConstructor']

register_flops()
