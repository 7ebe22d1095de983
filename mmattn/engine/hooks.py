"""Training hooks that mmengine lacks; all our configs have both among their default hooks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, set_random_seed
from mmengine.structures import BaseDataElement
from torch.nn.utils import get_total_norm


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """End training at a loss or at weights that are not finite, before these are saved.

    mmdet's CheckInvalidLossHook checks every 50th iteration and names neither losses nor images.
    The unscaled loss is checked, as gradients may overflow under mixed precision's loss scale.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Check the loss of an iteration.

        Raises:
            FloatingPointError: the loss is not finite, or the weights are not after the step, which
                a gradient then was not; the message has the iteration, the losses and the batch's
                images, or the parameters.
        """
        if torch.as_tensor(outputs['loss']).isfinite():
            self._check_weights(runner)
            return
        losses = {k: torch.as_tensor(v).item() for k, v in outputs.items() if 'loss' in k}
        invalid = [f'{k} is {v}' for k, v in losses.items() if not math.isfinite(v)]
        images = ', '.join(_image_paths(data_batch))
        raise FloatingPointError(
            f'{", ".join(invalid)} at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch '
            f'{batch_idx + 1}), whose images are {images}. Look at these and at the losses '
            'logged before: if they grew, lower optim_wrapper.optimizer.lr or set '
            'optim_wrapper.clip_grad'
        )

    @staticmethod
    def _check_weights(runner: Runner) -> None:
        named = runner.model.named_parameters()  # empty where FSDP has them on other ranks
        trained = {k: p.detach() for k, p in named if p.requires_grad and p.numel()}
        # The greatest of all: a sum of squares could overflow.
        if get_total_norm(trained.values(), math.inf).isfinite():
            return
        invalid = [name for name, value in trained.items() if not value.isfinite().all()]
        raise FloatingPointError(
            f'weights are not finite after iteration {runner.iter + 1} (epoch {runner.epoch + 1}), '
            f'though its loss was: gradients of {len(invalid)} parameters were NaN or infinite, '
            f'such as {", ".join(invalid[:3])}. They were not saved: --resume '
            'goes on from the last checkpoint; lower optim_wrapper.optimizer.lr or set '
            'optim_wrapper.clip_grad'
        )


def _image_paths(node: Any) -> list[str]:
    """Image files of all samples in a batch, however nested."""
    if isinstance(node, BaseDataElement):
        return [str(node.get('img_path'))]
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return []
    return [path for child in node for path in _image_paths(child)]


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed each iteration by the run's seed, the iteration's number and the rank.

    A resumed run then draws the random numbers of an uninterrupted one (stochastic depth, sampled
    boxes, mixup): mmengine's checkpoints hold the seed, but no generator's state. Data loader
    workers are seeded by mmengine when they start.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._seed(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        # For the next batch, if this process loads it.
        self._seed(runner, runner.iter + 1)

    @staticmethod
    def _seed(runner: Runner, iteration: int) -> None:
        mixed = np.random.SeedSequence([runner.seed, iteration, get_rank()])
        set_random_seed(int(mixed.generate_state(1)[0]))
