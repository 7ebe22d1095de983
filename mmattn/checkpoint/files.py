"""Reading named tensors from a path, a URL or a state dict without executing code of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .address import label_of
from .download import find_file
from .errors import CheckpointError
from .kinds import START, not_a_checkpoint
from .pickled import Unreadable
from .torch_file import read_torch_file
from .wrappers import unwrap

# Containers of the weights in checkpoints of training programs, and of their average; the first
# that is there wins.
RAW_WEIGHTS = ('state_dict', 'model')
AVERAGED_WEIGHTS = ('state_dict_ema', 'model_ema')
CONTAINERS = RAW_WEIGHTS + AVERAGED_WEIGHTS
# mmengine's EMAHook exchanges the two: the average is in state_dict, and this has what was trained.
MMENGINE_RAW_WEIGHTS = 'ema_state_dict'


def read_state_dict(source: str | Path | Mapping) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a checkpoint by name, on the CPU, and a label of the source for messages.

    Tensors of a file may be mapped: it must not change while they are in use.

    Args:
        source: a ``.safetensors`` file or one of ``torch.save``, an http(s) address of one
            (as :func:`mmattn.checkpoint.find_file` finds it), or a mapping. Weights may lie in a
            container ('state_dict', 'model', ...) and have names that wrappers add to.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be downloaded, is damaged, holds more than tensors and
            plain values, or has no weights in it.
        TypeError: source is none of the above.
    """
    content, label = read_checkpoint(source)
    return weights_of(content, label, default_container(content)), label


def read_checkpoint(source: str | Path | Mapping) -> tuple[Any, str]:
    """Read all of a checkpoint, and its label; arguments and errors as :func:`read_state_dict`."""
    if isinstance(source, Mapping):
        return source, 'a state dict'
    if isinstance(source, (str, Path)):
        return _read_file(find_file(str(source))), label_of(str(source))
    raise TypeError(f'source must be a path, a URL or a state dict, got {type(source).__name__}')


def default_container(content: Any) -> str | None:
    """Container whose weights are taken where nobody chooses; None if they are at the top."""
    return next((name for name in CONTAINERS if _has(content, name)), None)


def weight_sets(content: Any) -> dict[str, str]:
    """Containers of a checkpoint's weights: 'raw' as trained, 'ema' averaged over the training."""
    if _has(content, MMENGINE_RAW_WEIGHTS) and 'steps' in content[MMENGINE_RAW_WEIGHTS]:
        return dict(ema='state_dict', raw=MMENGINE_RAW_WEIGHTS)
    sets = {}
    for kind, containers in (('raw', RAW_WEIGHTS), ('ema', AVERAGED_WEIGHTS)):
        if there := [name for name in containers if _has(content, name)]:
            sets[kind] = there[0]
    return sets


def weights_of(content: Any, label: str, container: str | None) -> dict[str, Tensor]:
    """Tensors in a container of a checkpoint, or at its top, without what wrappers add to names.

    Raises:
        CheckpointError: there are none, or one is sparse or quantized.
    """
    named = content if container is None else content[container]
    if not isinstance(named, Mapping):
        raise CheckpointError(f'{label} holds a {type(named).__name__}, not named tensors')
    state = {}
    for name, value in named.items():
        if kind := _without_numbers(value):
            raise CheckpointError(f'{label} has {name} as {kind}; only plain tensors are read')
        if isinstance(value, Tensor):
            state[str(name)] = value
    if not state:
        names = ', '.join(map(str, list(named)[:5])) or 'nothing'
        raise CheckpointError(
            f'{label} holds no tensors under {", ".join(CONTAINERS)} or its top; it holds {names}'
        )
    if container == MMENGINE_RAW_WEIGHTS:
        state.pop('steps', None)
    return unwrap(state)


def is_finite(value: Tensor) -> bool:
    """True if a tensor holds neither NaN nor infinity."""
    if value.is_meta or not value.is_floating_point():
        return True
    # A finite sum proves it, and takes no memory; the sum of large numbers may overflow.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_finite(state: Mapping[str, Tensor], label: str) -> None:
    """Raise a :class:`CheckpointError` if a tensor holds NaN or infinity."""
    invalid = [name for name, value in state.items() if not is_finite(value)]
    if invalid:
        raise CheckpointError(
            f'{label} holds NaN or infinity in {len(invalid)} tensors, such as {invalid[0]}'
        )


def _without_numbers(value: object) -> str:
    """Kind of a tensor without plain numbers in memory; '' for all others."""
    if isinstance(value, Unreadable):
        return value.what
    if not isinstance(value, Tensor):
        return ''
    if value.layout is not torch.strided:
        return 'a sparse tensor'
    return 'a quantized tensor' if value.is_quantized else ''


def _has(content: object, container: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(container), Mapping)


def _read_file(path: Path) -> Any:
    with path.open('rb') as file:
        kind = not_a_checkpoint(file.read(START))
    if kind:
        raise CheckpointError(f'{path} is {kind}, and no checkpoint')
    return _read_safetensors(path) if _is_safetensors(path) else read_torch_file(path)


def _is_safetensors(path: Path) -> bool:
    """True if a file begins with the header's length as 8 bytes and a JSON object."""
    with path.open('rb') as file:
        start = file.read(9)
    return start[8:] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f'{path} needs the package safetensors: pip install safetensors'
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{path} is damaged or cut short: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
