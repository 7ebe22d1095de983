"""Train a detector, segmentor or classifier: ``tools/train.py CONFIG [options]``."""

import argparse
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from mmengine.config import Config
from torch import nn

from mmattn.checkpoint import CheckpointError
from mmattn.engine.resuming import (
    checkpoints,
    last_good,
    let_mmengine_read,
    misfits,
    read_training,
)
from mmattn.engine.runtime import (
    adapt_to_device,
    add_options,
    build_runner,
    check_data,
    is_rank_zero,
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
    lock = occupy(cfg.work_dir)
    resume(cfg, args.resume)
    adapt_to_device(cfg)
    # With compile=True mmengine compiles the whole train step. Parts that torch cannot compile (in
    # 2.13 mixup's `x[torch.randperm(n)]` and AdamW's step) run uncompiled instead of raising.
    torch._dynamo.config.suppress_errors = True
    runner = build_runner(cfg)
    if cfg.get('resume') and not is_sharded(cfg):
        check_fit(runner.model, cfg.load_from)
    try:
        runner.train()
    except CheckpointError as error:  # of the published weights that training starts from
        stop(str(error))
    finally:
        lock.release()


def occupy(work_dir: str) -> BaseFileLock:
    """Keep other trainings out of a folder until this one ends; stop if there is one."""
    path = Path(work_dir, '.lock')
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if not is_rank_zero():
        return lock
    try:
        lock.acquire(timeout=0)
    except Timeout:
        stop(f'{work_dir} is in use by another training: choose another --work-dir')
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        warn(
            f'{path} cannot be locked ({error}): take care that no other training uses the folder.'
        )
    return lock


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
        good, reasons = last_good(cfg.work_dir)
        for reason in reasons:
            warn(f'--resume: {reason}')
        if good is None and earlier:
            stop(f'--resume: no checkpoint in {cfg.work_dir} is whole and finite')
        if good is None:
            warn(f'--resume: no checkpoint in {cfg.work_dir} yet, so training starts anew.')
            return
        if reasons:
            warn(f'--resume: going on from {good}.')
        source = str(good)
    try:
        checkpoint = read_training(source)
    except (CheckpointError, FileNotFoundError) as error:
        stop(f'--resume: {error}')
    cfg.resume = True
    cfg.load_from = str(source)
    drop_pretrained(cfg.model)  # the checkpoint replaces those weights
    # mmengine restores a drawn seed after it has built the data loader, whose order then differs.
    if cfg.get('randomness', {}).get('seed') is None:
        seed = checkpoint['meta'].get('seed')
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)
    let_mmengine_read()


def check_fit(model: nn.Module, source: str) -> None:
    """Stop unless a checkpoint has all weights of the model, and no others."""
    if names := misfits(model, read_training(source)):
        stop(
            f'--resume: {source} is of another model: {len(names)} names or shapes differ, such as '
            f'{", ".join(names[:3])}'
        )


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


if __name__ == '__main__':
    main()
