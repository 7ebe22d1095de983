"""Strip a training checkpoint for publication, and name it by its hash.

    python tools/model_converters/publish_model.py epoch_300.pth published --name gcvit_t_imagenet

writes ``published/gcvit_t_imagenet-xxxxxxxx.pth``, with the first eight digits of its SHA-256 in
the name, as OpenMMLab's model zoos do. It holds the weights and the training's ``meta`` (config,
classes, versions) as plain data: OpenMMLab's tools, ``torch.load(..., weights_only=True)`` and
``mmattn.checkpoint.load_checkpoint`` read it. Optimizer, schedulers, logs and the other set of
weights are left out. The same checkpoint gives the same file.
"""

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmattn
from mmattn.checkpoint import (
    CheckpointError,
    check_finite,
    read_checkpoint,
    weight_sets,
    weights_of,
)

KINDS = {'ema': 'averaged (EMA)', 'raw': 'raw'}


def main() -> None:
    args = parse_args()
    print(f'reading {args.src}')
    try:
        content, label = read_checkpoint(args.src)
        container = choose(weight_sets(content), args.weights, label)
        # Clones: a view would be saved with its whole storage. Convolutions may be channel-last.
        state = {
            k: v.clone(memory_format=torch.contiguous_format)
            for k, v in weights_of(content, label, container).items()
        }
        check_finite(state, label)
        rest = {
            name: value
            for name, value in content.items()
            if name != container and (container or not isinstance(value, torch.Tensor))
        }
        meta = rest.pop('meta', {})
        meta, left_out = plain(meta if isinstance(meta, Mapping) else {})
        meta['mmattn_version'] = mmattn.__version__
        print(f'left out: {", ".join([*map(str, rest), *left_out]) or "nothing"}')
        dst = write(dict(meta=meta, state_dict=state), args.dst_dir, args.name)
    except (CheckpointError, OSError) as error:
        sys.exit(str(error))
    before, after = (f'{path.stat().st_size / 1e6:.1f} MB' for path in (args.src, dst))
    print(
        f'{len(state)} tensors and meta ({", ".join(meta)}) written to {dst}: {after} of {before}'
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('src', type=Path, help='checkpoint of a training')
    parser.add_argument('dst_dir', type=Path, nargs='?', help='folder to write to [that of src]')
    parser.add_argument('--name', help="the file's name before the hash [that of src]")
    parser.add_argument(
        '--weights',
        choices=KINDS,
        help='which to publish: averaged over the training, or as trained [ema where src has it]',
    )
    args = parser.parse_args()
    if re.match('https?:/', str(args.src)):
        parser.error('argument src must be a file, got an address; download it first')
    args.dst_dir = args.dst_dir or args.src.parent
    args.name = args.name or args.src.stem
    if Path(args.name).name != args.name or args.name == '..':
        parser.error(f'argument --name must be a file name without a folder, got {args.name}')
    if args.dst_dir.exists() and not args.dst_dir.is_dir():
        parser.error(f'{args.dst_dir} is a file; name a folder')
    return args


def choose(sets: dict[str, str], wanted: str | None, label: str) -> str | None:
    """Return the key of the weights to publish; None if they are at the top of the file."""
    if not sets and wanted != 'ema':
        print('weights: at the top of the file, without a container')
        return None
    kind = wanted or ('ema' if 'ema' in sets else 'raw')
    if kind not in sets:
        raise CheckpointError(
            f'{label} has no {KINDS[kind]} weights; '
            f'it has {", ".join(KINDS[name] for name in sets) or "one set"}'
        )
    print(f'weights: {KINDS[kind]}, from {sets[kind]}')
    return sets[kind]


def plain(meta: Mapping) -> tuple[dict, list[str]]:
    """Split `meta` into entries of plain data and the names of the others."""
    kept, left_out = {}, []
    for name, value in meta.items():
        try:
            kept[str(name)] = as_plain(value)
        except TypeError as error:
            left_out.append(f'meta.{name} ({error})')
        except RecursionError:
            left_out.append(f'meta.{name} (it contains itself)')
    return kept, left_out


def as_plain(value: Any) -> Any:
    """Convert numbers, text, and lists, tuples and dictionaries of them to builtin types.

    Raises:
        TypeError: `value` holds another type.
    """
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(as_plain, value))
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(f'a {type(value).__name__}')


def write(checkpoint: dict, folder: Path, name: str) -> Path:
    """Save under a name that ends in the file's hash.

    Raises:
        FileExistsError: the folder has that file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.publish-', dir=folder) as temporary:
        # Given a path, torch.save would write its name into the file, which changes the hash.
        path = Path(temporary, 'model.pth')
        with path.open('wb') as file:
            torch.save(checkpoint, file)
        torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        dst = folder / f'{name}-{sha256(path)[:8]}.pth'
        if dst.exists():
            raise FileExistsError(f'{dst} exists, with the same content; nothing was written')
        path.rename(dst)
    return dst


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == '__main__':
    main()
