"""Learning rates that fall with the depth of a backbone's layers, in any OpenMMLab model."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmattn.checkpoint.wrappers import unwrap

PREFIX = 'backbone.'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Constructor of an optimizer whose learning rates decay from layer to layer.

    A parameter of depth d of n has the learning rate that mmengine's constructor gives it, times
    ``layer_decay_rate ** (n - 1 - d)``; depths are those of ``backbone.get_layer_depth``. It is for
    the models of any package. mmpretrain's constructor does the same for classifiers; mmdet's and
    mmseg's know the layers of ConvNeXt, BEiT and MAE alone.

    Args:
        optim_wrapper_cfg: config of the optimizer's wrapper.
        paramwise_cfg: ``layer_decay_rate``, above 0 and at most 1, and the options of mmengine's
            constructor.

    Raises:
        ValueError: ``layer_decay_rate`` is missing or out of range, or the optimizer's config has
            no ``lr``.
        TypeError: at the call, the model has no ``backbone`` with ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be above 0 and at most 1, got {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError(f'optimizer must have an lr, got {self.optimizer_cfg}')
        self.rate = rate

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: Any = None
    ) -> None:
        """Add a group for each parameter of ``module`` to ``params``; mmengine calls it."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # mmengine's recursion; below, all groups are there
            return
        backbone: Any = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                'layer-wise learning rates need a backbone with get_layer_depth, '
                f'got {type(backbone).__name__} in {type(module).__name__}'
            )
        names = {id(value): name for name, value in unwrap(dict(module.named_parameters())).items()}
        for group in params:
            (parameter,) = group['params']
            depth, count = backbone.get_layer_depth(names[id(parameter)], PREFIX)
            group['lr'] = group.get('lr', self.base_lr) * self.rate ** (count - 1 - depth)
