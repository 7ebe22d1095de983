"""Shared parts of the command-line tools: messages, options, configs, data, training on a CPU."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmattn.checkpoint import CheckpointError, LoadReport, load_checkpoint

# Dataset -> the environment variable by which our configs find it.
DATA_VARIABLES = {
    'CocoDataset': 'MMATTN_COCO',
    'ADE20KDataset': 'MMATTN_ADE20K',
    'ImageNet': 'MMATTN_IMAGENET',
}


# Environment variables of a process's rank: torchrun's and mmengine's, slurm's, Open MPI's.
RANKS = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


# ------------------------------------------------------------------------------------- messages


def is_rank_zero() -> bool:
    """True on rank 0, or without ranks."""
    ranks = (os.environ[name] for name in RANKS if name in os.environ)
    return int(next(ranks, 0)) == 0


def stop(message: str) -> NoReturn:
    """End the program with one sentence, printed by rank 0, and status 2."""
    if is_rank_zero():
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    """Log a warning on rank 0."""
    if is_rank_zero():
        print_log(message, logger='current', level=logging.WARNING)


# -------------------------------------------------------------------------- options and configs


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that mmdet's train.py and test.py have in common."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints [work_dirs/<config>]')
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it; torchrun sets the environment variable itself.
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options KEY=VALUE ...``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override the config, for example train_dataloader.batch_size=1 key=a,b '
        'key="[(a,b),(c,d)]"',
    )


def read_config(args: argparse.Namespace) -> Config:
    """Read the config file of the options, with their overrides, launcher and work_dir."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not Path(args.config).is_file():
        stop(f'there is no config file {args.config}')
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Stop unless the folders and annotation files of these data loaders exist.

    Remote data (an address such as ``s3://``) are left to mmengine.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        dataset = cfg[loader].dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        root = dataset.get('data_root') or ''
        if '://' in root:
            continue
        variable = DATA_VARIABLES.get(dataset.type)
        remedy = f'--cfg-options {loader}.dataset.data_root=FOLDER'
        if variable:
            remedy = f'the environment variable {variable}=FOLDER'
        for path in [Path(root), Path(root, dataset.get('ann_file') or '')]:
            if not path.exists():
                stop(
                    f'{loader} looks for {path}, which does not exist (from {Path.cwd()}); '
                    f'put or link the data there, or say where they are with {remedy}'
                )


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner: its ``runner_type``, or mmengine's Runner."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


# ------------------------------------------------------------------------------------ checkpoint


def load_weights(model: nn.Module, checkpoint: str, part: str = '') -> LoadReport:
    """Load a checkpoint of any format that mmattn reads; stop where weights are missing.

    Args:
        model: what to load into.
        checkpoint: file or URL.
        part: prefix of the tensors that need weights; the others may stay fresh.

    Returns:
        The report of :func:`mmattn.checkpoint.load_checkpoint`.
    """
    try:
        report = load_checkpoint(model, checkpoint)
    except (CheckpointError, FileNotFoundError) as error:
        stop(str(error))
    fresh = [name for name in report.fresh if name.startswith(part)]
    if fresh:
        stop(
            f'{report.source} ({report.format}) has no weights for {len(fresh)} tensors of the '
            f'model, such as {", ".join(fresh[:3])}; they would stay random'
        )
    if report.not_finite:
        stop(
            f'{report.source} ({report.format}) holds NaN or infinity in {len(report.not_finite)} '
            f'tensors, such as {", ".join(report.not_finite[:3])}'
        )
    return report


# --------------------------------------------------------------- machines without an NVIDIA GPU


def is_sharded(cfg: Config) -> bool:
    """True if the config shards its model over processes by FSDP."""
    return 'FSDP' in cfg.get('strategy', {}).get('type', '')


def adapt_to_device(cfg: Config) -> None:
    """On a CPU, or on Apple's GPU (mps), replace the config's parts that need another device."""
    device = get_device()
    if device in ('cpu', 'mps'):
        use_float32(cfg, device)
    if device != 'cpu' or cfg.launcher == 'none':
        return
    if is_sharded(cfg):
        shard_on_cpu(cfg)
    join_by_gloo(cfg)
    replace_sync_bn(cfg)


def use_float32(cfg: Config, device: str) -> None:
    """Replace AmpOptimWrapper, which mmengine does not have for the device, by OptimWrapper."""
    if cfg.get('optim_wrapper', {}).get('type') != 'AmpOptimWrapper':
        return
    warn(f"Training in float32, since mmengine's AmpOptimWrapper does not run on {device}.")
    kept = {k: v for k, v in cfg.optim_wrapper.items() if k not in ('loss_scale', 'dtype')}
    cfg.optim_wrapper = ConfigDict(kept, type='OptimWrapper')


def shard_on_cpu(cfg: Config) -> None:
    """Let FSDP shard on the CPU.

    Its default device is an accelerator, and its copy of the state to the CPU would free what it
    copies: ``offload_to_cpu`` is left out.
    """
    cfg.strategy.model_wrapper.device_id = 'cpu'
    cfg.strategy.state_dict_cfg = dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
    )


def join_by_gloo(cfg: Config) -> None:
    """Start the process group by gloo, and wrap the model without device indices.

    The Runner takes a process group that it finds; its own initialization needs CUDA.
    """
    if cfg.launcher != 'pytorch':
        stop(f'--launcher {cfg.launcher} needs GPUs; without one use --launcher pytorch (torchrun)')
    warn('No GPU: the processes communicate by gloo instead of nccl.')
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )


def replace_sync_bn(cfg: Config) -> None:
    """Replace SyncBN, which needs GPUs, by BN: each process normalizes its own images."""
    if _replace_type(cfg.model, 'SyncBN', 'BN'):
        warn('No GPU: BN replaces SyncBN; each process normalizes its own images.')


def _replace_type(node: Any, old: str, new: str) -> int:
    """Replace every ``type=old`` below `node`; return the number of replacements."""
    if isinstance(node, (list, tuple)):
        return sum(_replace_type(child, old, new) for child in node)
    if not isinstance(node, dict):
        return 0
    hit = node.get('type') == old
    if hit:
        node['type'] = new
    return hit + sum(_replace_type(child, old, new) for child in node.values())
