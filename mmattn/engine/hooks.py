"""What training needs and mmengine's hooks do not do; all our configs have both among their default hooks."""

from __future__ import annotations

import math

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, set_random_seed
from mmengine.structures import BaseDataElement


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Ends training at a loss that is not finite, before a checkpoint is written from its weights.

    mmdet's CheckInvalidLossHook looks at every 50th iteration and names nothing. A gradient that overflows
    under mixed precision's loss scale is normal, and does not end it: the loss is looked at, unscaled.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Raise a FloatingPointError with the iteration, the losses at fault, and the images."""
        if torch.as_tensor(outputs['loss']).isfinite():
            return
        losses = {k: torch.as_tensor(v).item() for k, v in outputs.items() if 'loss' in k}
        invalid = [f'{k} is {v}' for k, v in losses.items() if not math.isfinite(v)]
        images = ', '.join(_image_paths(data_batch))
        raise FloatingPointError(
            f'{", ".join(invalid)} at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch '
            f'{batch_idx + 1}), whose images are {images}. Look at these and at the losses logged before: '
            'if they grew, lower optim_wrapper.optimizer.lr or set optim_wrapper.clip_grad'
        )


def _image_paths(node) -> list[str]:
    """The image files of all samples in a batch, however it is nested."""
    if isinstance(node, BaseDataElement):
        return [str(node.get('img_path'))]
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return []
    return [path for child in node for path in _image_paths(child)]


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Makes the random numbers of an iteration depend on the seed, its number and the rank alone.

    So a resumed run draws what the interrupted one would have drawn (stochastic depth, sampled boxes, mixup):
    mmengine's checkpoints hold the seed, but no generator's state. What processes that load data draw, is
    seeded by mmengine when they start.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._seed(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        # For the next batch, where this process loads it.
        self._seed(runner, runner.iter + 1)

    @staticmethod
    def _seed(runner: Runner, iteration: int) -> None:
        mixed = np.random.SeedSequence([runner.seed, iteration, get_rank()])
        set_random_seed(int(mixed.generate_state(1)[0]))
