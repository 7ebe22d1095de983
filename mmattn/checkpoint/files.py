"""From a path, a URL or a state dict to named tensors, without ever executing what a file contains."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

# Where training programs keep the weights within a checkpoint, the first that is there wins.
CONTAINERS = ('state_dict', 'model', 'state_dict_ema', 'model_ema')


class CheckpointError(ValueError):
    """A checkpoint cannot be read, is none of the known formats, or does not fit the model."""


def read_state_dict(source: str | Path | Mapping) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by name, on the CPU, and what to call their source in messages.

    Args:
        source: a file, an http(s) address (downloaded once into torch.hub's folder), or a mapping. Weights may
            lie in a container ('state_dict', 'model', ...) and carry DDP's ``module.`` prefix.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, needs more than tensors and plain values to be read, or has no
            weights in it.
        TypeError: source is none of the above.
    """
    if isinstance(source, Mapping):
        content, label = source, 'a state dict'
    elif isinstance(source, (str, Path)):
        label = str(source)
        content = _read_file(_local_file(label))
    else:
        raise TypeError(
            f'source must be a path, a URL or a state dict, got {type(source).__name__}'
        )
    return _weights(content, label), label


def _local_file(source: str) -> Path:
    url = urlparse(source)
    if url.scheme not in ('http', 'https'):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f'there is no checkpoint file {path}')
        return path
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(url.path).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f'downloading {source} to {path}')
        torch.hub.download_url_to_file(source, str(path))
    return path


def _read_file(path: Path):
    try:
        with torch.serialization.safe_globals(_training_state_types()):
            # Zip files (torch >= 1.6) are mapped, so that the weights are not in memory twice.
            return torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if 'Unsupported' in str(error) or 'GLOBAL' in str(error):
            raise CheckpointError(
                f'{path} holds more than tensors and plain values, and reading it would execute code from the '
                f'file; if you trust it, save its weights alone: '
                f'torch.save(torch.load(file, weights_only=False)["state_dict"], new_file)'
            ) from error
        raise CheckpointError(
            f'{path} is no torch checkpoint, or is damaged: {_first_line(error)}'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f'{path} is damaged or cut short: {_first_line(error)}') from error


def _training_state_types() -> list:
    """What mmengine's training checkpoints hold beside tensors: its logs, which are numpy arrays."""
    array = np.zeros(1)
    reconstruct = array.__reduce__()[0]
    scalar = array[0].__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')]
    log = (_Log, 'mmengine.logging.history_buffer.HistoryBuffer')
    # The logs refer to their own methods by name; nobody calls them here, so they become nothing.
    names = [(_nothing, f'{module}.getattr') for module in ('builtins', '__builtin__')]
    return [log, np.ndarray, np.dtype, reconstruct, scalar, *dtypes, *names]


class _Log:
    """Stands for mmengine's HistoryBuffer, whose unpickling would change that class for all."""

    def __setstate__(self, state) -> None:
        """Forget what was logged: loading weights has no use for it."""


def _nothing(*_) -> None:
    """Stands for a function that a file names."""


def _weights(content, label: str) -> dict[str, Tensor]:
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{label} holds a {type(content).__name__}, not named tensors')
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        names = ', '.join(map(str, list(content)[:5])) or 'nothing'
        raise CheckpointError(
            f'{label} holds no tensors under {", ".join(CONTAINERS)} or its top; it holds {names}'
        )
    if all(name.startswith('module.') for name in state):
        state = {name.removeprefix('module.'): value for name, value in state.items()}
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
