"""Reading named tensors from a path, a URL or a state dict without executing code of a file."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .address import label_of
from .download import find_file
from .errors import CheckpointError
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
        CheckpointError: there are none.
    """
    named = content if container is None else content[container]
    if not isinstance(named, Mapping):
        raise CheckpointError(f'{label} holds a {type(named).__name__}, not named tensors')
    state = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not state:
        names = ', '.join(map(str, list(named)[:5])) or 'nothing'
        raise CheckpointError(
            f'{label} holds no tensors under {", ".join(CONTAINERS)} or its top; it holds {names}'
        )
    if container == MMENGINE_RAW_WEIGHTS:
        state.pop('steps')
    return unwrap(state)


def _has(content: object, container: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(container), Mapping)


def _read_file(path: Path) -> Any:
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


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


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_training_state_types()):
            # Zip files (torch >= 1.6) are mapped, so that the weights are not in memory twice.
            return torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if 'Unsupported' in str(error) or 'GLOBAL' in str(error):
            raise CheckpointError(
                f'{path} holds more than tensors and plain values, and reading it would execute '
                f'code from the file; if you trust it, save its weights alone: '
                f'torch.save(torch.load(file, weights_only=False)["state_dict"], new_file)'
            ) from error
        raise CheckpointError(
            f'{path} is no checkpoint of torch or safetensors, or is damaged: {_first_line(error)}'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f'{path} is damaged or cut short: {_first_line(error)}') from error


def _training_state_types() -> list:
    """Types saved beside tensors: options (timm, Swin, mmcv) and logs (mmengine)."""
    array = np.zeros(1)
    # Each by its name in files of numpy 1 and of numpy 2.
    numpy = [
        (part.__reduce__()[0], f'numpy.{core}.multiarray.{name}')
        for part, name in ((array, '_reconstruct'), (array[0], 'scalar'))
        for core in ('core', '_core')
    ]
    dtypes = [type(np.dtype(name)) for name in _NUMPY_DTYPES]
    log = (_Log, 'mmengine.logging.history_buffer.HistoryBuffer')
    # The logs refer to their own methods by name; nobody calls them here, so they become nothing.
    names = [(_nothing, f'{module}.getattr') for module in ('builtins', '__builtin__')]
    options = [(OrderedDict, name) for name in _DICTIONARIES]
    return [argparse.Namespace, slice, np.ndarray, np.dtype, *numpy, *dtypes, log, *names, *options]


_NUMPY_DTYPES = ('float64', 'float32', 'int64', 'int32', 'uint32', 'uint8', 'bool')
# Dictionaries whose keys are attributes; they are read as plain ones.
_DICTIONARIES = (
    'yacs.config.CfgNode',
    'addict.addict.Dict',
    'mmcv.utils.config.ConfigDict',
    'mmengine.config.config.ConfigDict',
)


class _Log:
    """Stand-in for mmengine's HistoryBuffer, whose unpickling would change that class for all."""

    def __setstate__(self, state: object) -> None:
        """Forget the log: loading weights has no use for it."""


def _nothing(*_: object) -> None:
    """Stand-in for a function that a file names."""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
