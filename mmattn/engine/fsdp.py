"""Parameters, gradients and optimiser states spread over processes: mmengine's FSDP strategy for the backbones.

``configs/_base_/fsdp.py`` names what is here; nothing in the package needs it.
"""

from __future__ import annotations

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.optim import BaseOptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from mmattn.backbones.dat import DATStage
from mmattn.backbones.gcvit import GCViTBlock
from mmattn.backbones.quadtree import QuadTreeBlock

# What is gathered at a time. A block of DAT is a function of modules and no module, so there it is the stage.
UNITS = (GCViTBlock, DATStage, QuadTreeBlock)


def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: a backbone's blocks are units of their own; all else goes with the model."""
    return recurse or isinstance(module, UNITS)


class BlockFSDPStrategy(FSDPStrategy):
    """mmengine's :class:`FSDPStrategy`, with the updates that training without sharding makes.

    mmengine 0.10's own differs in three ways, the first two of them silently. It clips gradients by the norm of
    each process's part; it forms the optimiser's groups from the flat parts, which all count as vectors, so that
    ``flat_decay_mult`` is for every parameter; and it cannot resume, as torch 2.1 changed the order of an argument.
    """

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        # Of a kernel that lies channel-last, torch 2.13 loads the optimiser's state in the wrong order.
        return super()._wrap_model(model.to(memory_format=torch.contiguous_format))

    def build_optim_wrapper(self, optim_wrapper, model: nn.Module) -> BaseOptimWrapper:
        """The optimiser's wrapper, its groups formed from parameters of their own shapes."""
        with FSDP.summon_full_params(model, writeback=False):
            wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            wrapper.clip_func = lambda _, **limits: model.clip_grad_norm_(**limits)
        return wrapper

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load what ``optim_state_dict`` gave, by the names of parameters."""
        own = FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, state_dict)
        self.optim_wrapper.load_state_dict(own)
