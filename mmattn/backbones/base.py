"""The transformer block, the stage and the pyramid that all backbones are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmattn.checkpoint import CheckpointError, load_checkpoint, rename_on_load
from mmattn.layers import ChannelFirst, ScaledResidual
from mmattn.ops import recording

NUM_STAGES = 4
MIN_IMAGE_SIDE = 32

# All blocks share the code that is compiled; each kind, width, mode (training or evaluation) and
# drop path (present or absent) needs a program, image sizes and batches do not. torch's limit of 8
# would leave most blocks uncompiled.
_MAX_PROGRAMS = 128

_DO_WITHOUT = 'to start from random weights: --cfg-options model.backbone.init_cfg=None'

Arch = TypeVar('Arch')


class TransformerBlock(nn.Module):
    """Norm, attention, residual, norm, MLP, residual, on (B, H, W, C).

    Args:
        dim: channels C.
        attn: takes the normed map and the block's further inputs.
        mlp: takes the normed map.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of the learned scales gamma1, gamma2; None: no scales.
        norm_eps: of both norms.
        conv: takes a channel-first map; its output is added before the first norm (DAT++).
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        conv: nn.Module | None = None,
    ):
        super().__init__()
        self.conv = conv
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.residual = ScaledResidual(drop_path)
        for name in ('gamma1', 'gamma2'):
            scale = None if layer_scale is None else torch.full((dim,), float(layer_scale))
            self.register_parameter(name, None if scale is None else nn.Parameter(scale))

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """(B, H, W, C) and further inputs of the attention -> (B, H, W, C)."""
        if self.conv is not None:
            x = x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.residual(x, self.attn(self.norm1(x), *inputs), self.gamma1)
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma2)


class Stage(nn.Module):
    """Downsampling, then blocks of one resolution.

    Args:
        blocks: the blocks.
        downsample: takes the previous stage's map (B, H, W, C); None in the first stage.
        norm: of the stage's output, which also feeds the next stage; None: no norm.
        with_cp: recompute the blocks in backward instead of storing their activations.
    """

    blocks: Sequence[TransformerBlock]

    def __init__(
        self,
        blocks: Sequence[TransformerBlock],
        downsample: nn.Module | None,
        norm: nn.Module | None = None,
        with_cp: bool = False,
    ):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment] # typed by its elements
        self.norm = norm
        self.with_cp = with_cp

    def block_inputs(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """Further inputs of each block, made once from the stage's map (B, H, W, C)."""
        return [()] * len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map of the previous stage, (B, H', W', C') -> (B, H, W, C)."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block, inputs in zip(self.blocks, self.block_inputs(x), strict=True):
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, *inputs, use_reentrant=False)
            else:
                x = block(x, *inputs)
        return x if self.norm is None else self.norm(x)


class PyramidBackbone(BaseModule):
    """Stem and up to four stages at 1/4, 1/8, 1/16 and 1/32 of the image.

    Stages after the last output are not built. Published checkpoints load by ``load_state_dict``,
    alone or inside a model: their names and tables are fitted on the way
    (:func:`mmattn.checkpoint.rename_on_load`).

    Args:
        stem: takes the image, channel-last.
        stages: as many as the last of ``out_indices`` needs.
        output_norms: channels of each output, which gets a LayerNorm; None where the stages have
            norms already.
        in_channels: channels of the images.
        out_indices: stages whose maps are returned, increasing, of 0 to 3.
        frozen_stages: -1: none; 0: the stem; n: the stem, the first n stages with their output
            norms and the downsampling behind them get no gradients and stay in evaluation mode,
            as in mmdet's Swin. It may be changed at any time and acts at the next ``train()``.
        compile_blocks: run the blocks through ``torch.compile``, for images of any size.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint=...)`` takes whatever
            :func:`mmattn.checkpoint.load_checkpoint` takes, and the schemes of mmengine's loader.
        pretrained: short for it, as in mmseg's backbones.
    """

    family: str
    """Family of the checkpoints, as in ``configs/<family>``."""
    stem: nn.Module
    stages: Sequence[Stage]
    init_cfg: dict | list | None

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        output_norms: Sequence[int] | None,
        in_channels: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        compile_blocks: bool,
        init_cfg: dict | list | None,
        pretrained: str | None,
    ):
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError('init_cfg and pretrained must not both be given')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg)
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(
                f'frozen_stages must be an integer from -1 to {NUM_STAGES}, got {frozen_stages!r}'
            )
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.stem = stem
        self.stages = nn.ModuleList(stages)  # type: ignore[assignment] # typed by its elements
        if output_norms is not None:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(output_norms[i]))
        # Modules, so that CAM tools and recorders can be given a layer whose map is channel-first.
        for i in self.out_indices:
            self.add_module(f'output{i}', ChannelFirst())
        self.apply(init_linear)
        self.register_load_state_dict_pre_hook(rename_on_load)
        self._freeze()
        if compile_blocks:
            self._compile_blocks()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one map (B, C_i, H_i, W_i) for each of ``out_indices``.

        H_i = ceil(H / 2**(i+2)). Sides below 32 are completed with zeros, and the maps are cropped.
        """
        check_image(x, self.in_channels)
        size = x.shape[2:]
        is_small = not recording() and min(size) < MIN_IMAGE_SIDE
        if is_small:
            bottom, right = (max(0, MIN_IMAGE_SIDE - side) for side in size)
            x = F.pad(x, (0, right, 0, bottom))
        x = self.stem(x.permute(0, 2, 3, 1))
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}', None)
                output = x if norm is None else norm(x)
                if is_small:
                    rows, columns = ((side - 1) // 2 ** (i + 2) + 1 for side in size)
                    output = output[:, :rows, :columns]
                outputs.append(getattr(self, f'output{i}')(output))
        return tuple(outputs)

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def init_weights(self) -> None:
        """Apply ``init_cfg``: published weights by our loader, all else by mmengine.

        Raises:
            CheckpointError: the published weights cannot be had or do not fit.
        """
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        pretrained = [config for config in configs if _is_pretrained(config)]
        whole, self.init_cfg = self.init_cfg, [c for c in configs if c and c not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = whole
        for config in pretrained:
            try:
                source = _fetch(config['checkpoint'])
                report = load_checkpoint(self, source, prefix=config.get('prefix'))
            except (CheckpointError, FileNotFoundError) as error:
                raise CheckpointError(f'{error}; {_DO_WITHOUT}') from error.__cause__
            print_log(report.summary, logger='current')

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates, as mmpretrain's Swin counts it.

        Args:
            param_name: name of the parameter.
            prefix: what stands before the backbone's own names.

        Returns:
            Its depth, 0 for the stem, and the number of depths: one for each block, one for the
            stem and one for all that comes after.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        count = sum(depths) + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix):
            return count - 1, count
        if name.startswith('stem.'):
            return 0, count
        match = re.match(r'stages\.(\d+)\.(\w+)(?:\.(\d+))?', name)
        if match is None:
            return count - 1, count
        stage, part, block = int(match[1]), match[2], match[3]
        before = sum(depths[:stage])
        if part == 'blocks':
            return before + int(block) + 1, count
        # Downsampling belongs to the block before it, a norm of the stage to the stage's last.
        return {'downsample': before, 'norm': before + depths[stage]}.get(part, before + 1), count

    def _frozen_modules(self) -> Iterator[nn.Module]:
        if self.frozen_stages < 0:
            return
        yield self.stem
        for i, stage in enumerate(self.stages):
            if i < self.frozen_stages:
                yield stage
                if hasattr(self, f'norm{i}'):
                    yield getattr(self, f'norm{i}')
            elif i == self.frozen_stages > 0 and stage.downsample is not None:
                yield stage.downsample

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)

    def _compile_blocks(self) -> None:
        from torch._dynamo import config  # slow to import

        config.recompile_limit = max(config.recompile_limit, _MAX_PROGRAMS)
        for stage in self.stages:
            for block in stage.blocks:
                block.compile(dynamic=True)


def _is_pretrained(config: dict) -> bool:
    kind = config.get('type')
    return kind is PretrainedInit or str(kind).rpartition('.')[2] == 'Pretrained'


def _fetch(checkpoint: str) -> str | dict:
    """A path or address as it is; what has another scheme (``s3://``) through mmengine's loader."""
    scheme = re.match(r'([\w-]+)://', str(checkpoint))
    if scheme and scheme[1] not in ('http', 'https'):
        return CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    return checkpoint


def check_image(x: Tensor, channels: int) -> None:
    """Raise a ValueError unless ``x`` is a batch of images with that many channels."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f'x must be images (B, {channels}, H, W), got shape {tuple(x.shape)}')


def init_linear(module: nn.Module) -> None:
    """Draw linear weights (normal, std 0.02, truncated) and zero biases, as the papers do."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_channels(in_channels: int) -> int:
    """The number of channels, or a ValueError."""
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f'in_channels must be a positive integer, got {in_channels!r}')
    return in_channels


def stage_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Stage numbers as a tuple, or a ValueError."""
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    known = set(indices) <= set(range(NUM_STAGES))
    if not indices or not known or list(indices) != sorted(set(indices)):
        raise ValueError(
            f'out_indices must be increasing stage numbers from 0 to {NUM_STAGES - 1}, '
            f'got {out_indices!r}'
        )
    return indices


def per_stage(name: str, value: Any, minimum: int = 1) -> tuple[int, ...]:
    """One integer for each stage as a tuple, or a ValueError that names the argument."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != NUM_STAGES or not all(isinstance(v, int) and v >= minimum for v in values):
        raise ValueError(
            f'{name} must be {NUM_STAGES} integers of at least {minimum}, one a stage, '
            f'got {value!r}'
        )
    return values


def look_up_arch(arch: str | dict, zoo: dict[str, Arch], row: type[Arch]) -> Arch:
    """Row of a table of variants by its name, or a new row from a dict.

    Raises:
        ValueError: there is no row of that name, or the dict's keys are not the row's fields.
        TypeError: ``arch`` is neither a name nor a dict.
    """
    if isinstance(arch, str):
        if arch not in zoo:
            raise ValueError(f'arch must be one of {", ".join(zoo)} or a dict, got {arch!r}')
        return zoo[arch]
    if isinstance(arch, dict):
        try:
            return row(**arch)
        except TypeError as error:
            fields = ', '.join(signature(row).parameters)
            raise ValueError(
                f'arch as a dict takes the keys {fields}, got {", ".join(arch)} ({error})'
            ) from error
    raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rate of stochastic depth of each block of each stage, rising linearly from 0 to ``last``.

    Raises:
        ValueError: ``last`` is not in [0, 1).
    """
    if not isinstance(last, (int, float)) or not 0 <= last < 1:
        raise ValueError(f'drop_path_rate must be a number in [0, 1), got {last!r}')
    step = last / max(sum(depths) - 1, 1)
    rates = (i * step for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]
