"""FSDP for the backbones: parameters, gradients and optimizer state sharded block by block.

``configs/_base_/fsdp.py`` uses it; nothing in the package needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.optim import BaseOptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from mmattn.backbones.base import TransformerBlock


def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """``auto_wrap_policy`` of FSDP: a unit for each block, and the model for the rest."""
    return recurse or isinstance(module, TransformerBlock)


class BlockFSDPStrategy(FSDPStrategy):
    """mmengine's :class:`FSDPStrategy`, corrected to give the updates of unsharded training.

    mmengine 0.10 clips gradients by the norm of each process's shard. It forms the optimizer's
    groups from the flat shards, which all count as vectors, so that ``flat_decay_mult`` applies to
    every parameter. And it cannot resume, as torch 2.1 changed the order of arguments.
    """

    def build_optim_wrapper(self, optim_wrapper: Any, model: FSDP) -> BaseOptimWrapper:
        """Build the optimizer wrapper from unflattened parameters, to form the right groups."""
        with FSDP.summon_full_params(model, writeback=False):
            wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            wrapper.clip_func = lambda _, **limits: model.clip_grad_norm_(**limits)
        return wrapper

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer state that ``optim_state_dict`` returned, keyed by parameter name."""
        shards = FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, state_dict)
        self.optim_wrapper.load_state_dict(shards)
