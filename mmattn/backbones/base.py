"""What the backbones have in common as members of an OpenMMLab model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_STAGES = 4
MIN_IMAGE_SIDE = 32

# Blocks differ in width, kind, dropping or not, training or not; each of these is a program of its own, but image
# sizes and batches are not. torch's default of 8 would leave most blocks uncompiled.
_MAX_PROGRAMS = 128


class PyramidBackbone(BaseModule):
    """Four stages at 1/4, 1/8, 1/16 and 1/32 of the image, with an output norm for each one asked for.

    Stages after the last entry of ``out_indices`` are not built: no parameter is without a gradient.

    Args:
        out_indices: stages whose maps are returned, increasing, of 0 to 3.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages, with their output norms, get no
            gradients and stay in evaluation mode.
        with_cp: recompute blocks in the backward pass instead of storing their activations.
        compile_blocks: run the blocks through ``torch.compile``, for images of any size.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint=...)`` takes whatever
            :func:`mmattn.checkpoint.load_checkpoint` takes.
    """

    def __init__(
        self,
        out_indices: Sequence[int],
        frozen_stages: int,
        with_cp: bool,
        compile_blocks: bool,
        init_cfg: dict | None,
    ):
        super().__init__(init_cfg)
        self.out_indices = stage_indices(out_indices)
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(
                f'frozen_stages must be an integer from -1 to {NUM_STAGES}, got {frozen_stages!r}'
            )
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.compile_blocks = compile_blocks
        self._frozen: list[nn.Module] = []

    @property
    def num_built_stages(self) -> int:
        return self.out_indices[-1] + 1

    def freeze(self, stem_and_stages: Sequence[Sequence[nn.Module]]) -> None:
        """Freeze what ``frozen_stages`` says of these: the modules of the stem, then those of each stage."""
        self._frozen = [m for modules in stem_and_stages[: self.frozen_stages + 1] for m in modules]
        self.train(self.training)

    def output_norm(self, i: int) -> list[nn.Module]:
        """The norm of stage i's output, or nothing where it has none."""
        return [getattr(self, f'norm{i}')] if i in self.out_indices else []

    def run(self, block: Callable[..., Tensor], *inputs) -> Tensor:
        """``block(*inputs)``, compiled and recomputed in backward where the options ask for it."""
        call = _compiled_call() if self.compile_blocks else _call
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(call, block, *inputs, use_reentrant=False)
        return call(block, *inputs)

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        for module in self._frozen:
            module.eval().requires_grad_(False)
        return self

    def init_weights(self) -> None:
        """Load ``init_cfg``'s pretrained weights; fresh ones were drawn by the constructor."""
        if self.init_cfg and self.init_cfg.get('type') == 'Pretrained':
            from mmattn.checkpoint import load_checkpoint  # it looks at backbones from outside

            report = load_checkpoint(self, self.init_cfg['checkpoint'])
            print_log(report.summary, logger='current')
            self.is_init = True
        else:
            super().init_weights()


def _call(block: Callable[..., Tensor], *inputs) -> Tensor:
    return block(*inputs)


@functools.cache
def _compiled_call() -> Callable[..., Tensor]:
    from torch._dynamo import config  # slow to import

    config.recompile_limit = max(config.recompile_limit, _MAX_PROGRAMS)
    return torch.compile(_call, dynamic=True)


def stage_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    if (
        not indices
        or not set(indices) <= set(range(NUM_STAGES))
        or list(indices) != sorted(set(indices))
    ):
        raise ValueError(
            f'out_indices must be increasing stage numbers from 0 to {NUM_STAGES - 1}, got {out_indices!r}'
        )
    return indices


def per_stage(name: str, value: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """``value`` as a tuple with one integer for each stage, or an error that names the argument."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != NUM_STAGES or not all(isinstance(v, int) and v >= minimum for v in values):
        raise ValueError(
            f'{name} must be {NUM_STAGES} integers of at least {minimum}, one a stage, got {value!r}'
        )
    return values


def look_up_arch(arch, zoo: dict, family: str):
    """The row of ``zoo`` that ``arch`` names, or a row of the same type made from a dict.

    Raises:
        ValueError: no such name, or a dict whose keys are not the row's.
        TypeError: neither a name nor a dict.
    """
    row_type = type(next(iter(zoo.values())))
    if isinstance(arch, str):
        if arch not in zoo:
            raise ValueError(
                f'arch must be one of {", ".join(zoo)} or a dict for {family}, got {arch!r}'
            )
        return zoo[arch]
    if isinstance(arch, dict):
        try:
            return row_type(**arch)
        except TypeError as error:
            fields = ', '.join(row_type.__dataclass_fields__)
            raise ValueError(
                f'arch as a dict takes the keys {fields}, got {", ".join(arch)} ({error})'
            ) from error
    raise TypeError(f'arch must be a name or a dict for {family}, got {type(arch).__name__}')


def check_rate(name: str, rate: float) -> float:
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f'{name} must be a number in [0, 1), got {rate!r}')
    return float(rate)


def check_image(x: Tensor) -> None:
    """Raise a ValueError unless ``x`` is a batch of RGB images that four stages can halve."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f'x must be images (B, 3, H, W), got shape {tuple(x.shape)}')
    if any(side < MIN_IMAGE_SIDE for side in x.shape[2:]):
        raise ValueError(
            f'x must be at least {MIN_IMAGE_SIDE} pixels high and wide, got shape {tuple(x.shape)}'
        )


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth's rate for each block of each stage, rising linearly from 0 to ``last`` (arXiv 1603.09382)."""
    step = last / max(sum(depths) - 1, 1)
    rates = (i * step for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear(module: nn.Module) -> None:
    """Linear weights normal (std 0.02, truncated), biases zero; convolutions keep torch's own initialisation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def channel_last_kernels(module: nn.Module) -> None:
    """Lay a convolution's kernels out as the channel-last maps that it meets; shapes and values stay.

    Gradients come in this layout. Kernels in the other one cost a copy of each gradient, in torch's convolutions
    one of the kernels a call, and DistributedDataParallel's warning. 1 x 1 kernels are the same in both.
    """
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        module.to(memory_format=torch.channels_last)
