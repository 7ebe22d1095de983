"""FSDP for the backbones: parameters, gradients and optimizer state sharded block by block.

``configs/_base_/fsdp.py`` uses it; nothing in the package needs it.
"""

from __future__ import annotations

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.optim import BaseOptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from mmattn.backbones.base import TransformerBlock


def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: a unit for each block; all else goes with the model."""
    return recurse or isinstance(module, TransformerBlock)


class BlockFSDPStrategy(FSDPStrategy):
    """mmengine's :class:`FSDPStrategy`, corrected to make the updates of unsharded training.

    mmengine 0.10 clips gradients by the norm of each process's shard; it forms the optimizer's
    groups from the flat shards, which all count as vectors, so that ``flat_decay_mult`` applies to
    every parameter; and it cannot resume, as torch 2.1 changed the order of an argument.
    """

    def build_optim_wrapper(self, optim_wrapper, model: nn.Module) -> BaseOptimWrapper:
        """Optimizer wrapper whose groups are formed from parameters in their shapes."""
        with FSDP.summon_full_params(model, writeback=False):
            wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            wrapper.clip_func = lambda _, **limits: model.clip_grad_norm_(**limits)
        return wrapper

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the result of ``optim_state_dict``, by the names of parameters."""
        own = FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, state_dict)
        self.optim_wrapper.load_state_dict(own)
