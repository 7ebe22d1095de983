"""Checkpoints of trainings: read as plain data, checked, and the newest good one found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmattn.checkpoint import CheckpointError, check_finite, read_checkpoint
from mmattn.checkpoint.pickled import Log

PARTS = ('state_dict', 'meta', 'optimizer')
POINTER = 'last_checkpoint'


def read_training(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that a training can go on from.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint of a training, or has weights that
            are not finite.
        FileNotFoundError: there is no such file.
    """
    content = read_local(path)
    lacking = [x for x in PARTS if not isinstance(content, dict) or x not in content]
    lacking += [] if lacking or isinstance(content['meta'], dict) else ['meta']
    if lacking:
        raise CheckpointError(
            f'{path} has no {" and no ".join(lacking)}: a training cannot go on from it; to start '
            'from its weights: --cfg-options load_from=FILE'
        )
    weights = {k: v for k, v in content['state_dict'].items() if isinstance(v, Tensor)}
    check_finite(weights, str(path))
    return content


def read_local(path: str | Path, map_location: Any = None) -> Any:
    """Read any checkpoint for mmengine, with its logs.

    Args:
        path: the file.
        map_location: not used, as tensors go to the devices of what takes them; mmengine passes it.
    """
    return _copied(read_checkpoint(path)[0])


def _copied(node: Any) -> Any:
    """Tensors no longer mapped, as a later run may replace the file, and mmengine's logs."""
    if isinstance(node, Mapping):
        return {name: _copied(value) for name, value in node.items()}
    if isinstance(node, Log):
        return HistoryBuffer(node.values, node.counts, node.max_length)
    if isinstance(node, (list, tuple)):
        return type(node)(map(_copied, node))
    return node.clone() if isinstance(node, Tensor) else node


def let_mmengine_read() -> None:
    """Let mmengine read local files by :func:`read_local`: its own reader may execute them."""
    CheckpointLoader.register_scheme('', read_local, force=True)


def checkpoints(work_dir: str | Path) -> list[Path]:
    """Training checkpoints in `work_dir`, newest first."""
    found = [*Path(work_dir).glob('epoch_*.pth'), *Path(work_dir).glob('iter_*.pth')]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def last_good(work_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole and finite; that of ``last_checkpoint`` goes first.

    mmengine writes a checkpoint, then its path into ``last_checkpoint``, both in place, so that a
    kill or a full disk leaves a truncated file. Of the path the name counts: the folder may be a
    copy.

    Returns:
        The file, or None, and why others were passed over.
    """
    pointer, found = Path(work_dir, POINTER), checkpoints(work_dir)
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    name = named.replace('\\', '/').rpartition('/')[2]
    reasons = []
    if found and name not in {path.name for path in found}:
        reasons.append(f'{pointer} names no checkpoint of this folder ({named or "it is empty"})')
    for path in sorted(found, key=lambda path: path.name != name):
        try:
            read_training(path)
        except (CheckpointError, OSError) as error:
            reasons.append(str(error))
        else:
            return path, reasons
    return None, reasons


def misfits(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Names that only the model or only the checkpoint has, or that have two shapes."""
    model = getattr(model, 'module', model)
    there, wanted = checkpoint['state_dict'], model.state_dict()
    found = sorted(wanted.keys() ^ there.keys())
    common = wanted.keys() & there.keys()
    return found + [
        x for x in sorted(common) if getattr(there[x], 'shape', None) != wanted[x].shape
    ]
