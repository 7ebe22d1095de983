"""Train a detector, segmentor or classifier: ``tools/train.py CONFIG [options]``."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint

from mmattn.checkpoint import CheckpointError
from mmattn.engine.runtime import (
    adapt_to_device,
    add_options,
    build_runner,
    check_data,
    is_sharded,
    read_config,
    stop,
    warn,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a model.')
    add_options(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate with the batch size, from the config's base_batch_size",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or (auto) from the last whole one in the work_dir',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    if is_sharded(cfg) and args.launcher == 'none':
        stop(
            f'{args.config} shards its model over several processes: '
            f'tools/dist_train.sh {args.config} NUMBER'
        )
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            stop(f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} lacks')
        cfg.auto_scale_lr.enable = True
        # mmengine counts the images of an iteration, not of an update by accumulated gradients.
        cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)
    resume(cfg, args.resume)
    adapt_to_device(cfg)
    # With compile=True mmengine compiles the whole train step. Parts that torch cannot compile (in
    # 2.13 mixup's `x[torch.randperm(n)]` and AdamW's step) run uncompiled instead of raising.
    torch._dynamo.config.suppress_errors = True
    try:
        build_runner(cfg).train()
    except CheckpointError as error:  # of the published weights that training starts from
        stop(str(error))


def resume(cfg: Config, source: str | None) -> None:
    """Set the checkpoint to resume from; stop if an earlier run would be overwritten."""
    earlier = checkpoints(cfg.work_dir)
    if source is None:
        if earlier and not cfg.get('resume'):
            stop(
                f'{cfg.work_dir} holds checkpoints of an earlier run (such as {earlier[0].name}): '
                'go on with it by --resume, choose another --work-dir, or move it away'
            )
        return
    if source == 'auto':
        source = last_good(cfg.work_dir, earlier)
        if source is None:
            warn(f'--resume: no checkpoint in {cfg.work_dir} yet, so training starts anew.')
            return
    elif not Path(source).is_file():
        stop(f'--resume: there is no checkpoint file {source}')
    cfg.resume = True
    cfg.load_from = str(source)
    drop_pretrained(cfg.model)  # the checkpoint replaces those weights
    # mmengine restores a drawn seed after it has built the data loader, whose order then differs.
    if cfg.get('randomness', {}).get('seed') is None:
        seed = load_from_local(source, mmap=True).get('meta', {}).get('seed')
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)
    let_mmengine_resume()


def drop_pretrained(node: Any) -> None:
    """Take ``init_cfg=dict(type='Pretrained', ...)`` out of a model's config, wherever it is."""
    if isinstance(node, (list, tuple)):
        for child in node:
            drop_pretrained(child)
    elif isinstance(node, dict):
        inits = node.get('init_cfg') or []
        inits = inits if isinstance(inits, list) else [inits]
        if kept := [init for init in inits if init.get('type') != 'Pretrained']:
            node['init_cfg'] = kept
        elif inits:
            node['init_cfg'] = None
        for child in node.values():
            drop_pretrained(child)


def let_mmengine_resume() -> None:
    """Let mmengine 0.10.7 read its own checkpoints: it calls torch.load as before torch 2.6."""
    if not hasattr(checkpoint, 'get_torch_safe_globals'):
        checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)


def load_from_local(filename: str, map_location: Any = None, mmap: bool = False) -> dict:
    """Read a training checkpoint, with mmengine's logs in it, by ``weights_only=True``."""
    array = np.zeros(1)
    reduced = [part.__reduce__()[0] for part in (array, array[0])]
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'uint32')]
    allowed = [HistoryBuffer, getattr, np.ndarray, np.dtype, *reduced, *dtypes]
    with torch.serialization.safe_globals(allowed):
        return torch.load(filename, map_location=map_location, mmap=mmap, weights_only=True)


def checkpoints(work_dir: str | Path) -> list[Path]:
    """Training checkpoints in `work_dir`, newest first."""
    found = [*Path(work_dir).glob('epoch_*.pth'), *Path(work_dir).glob('iter_*.pth')]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def last_good(work_dir: str | Path, candidates: list[Path]) -> str | None:
    """Return the checkpoint named by `last_checkpoint`, or, if truncated, the newest whole one.

    mmengine writes a checkpoint, then its name into `last_checkpoint`, both in place. So a kill or
    a full disk leaves a truncated file that nothing points to, or an empty `last_checkpoint`.
    """
    pointer = Path(work_dir, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if named and zipfile.is_zipfile(named):
        return named
    good = next((path for path in candidates if zipfile.is_zipfile(path)), None)
    if good is not None:
        warn(
            f'{pointer} names no whole checkpoint ({named or "it is empty"}): going on from {good}.'
        )
    return None if good is None else str(good)


if __name__ == '__main__':
    main()
