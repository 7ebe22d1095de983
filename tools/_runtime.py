"""What train.py and test.py share: options, the config, and what a machine may lack."""

import logging
import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

# Dataset -> the environment variable by which our configs find it.
DATA_VARIABLES = {
    'CocoDataset': 'MMATTN_COCO',
    'ADE20KDataset': 'MMATTN_ADE20K',
    'ImageNet': 'MMATTN_IMAGENET',
}


def is_first():
    """Whether this is the one process, or of several the one that speaks."""
    return int(os.environ.get('RANK', 0)) == 0


def stop(message):
    """End the program with one sentence and status 2."""
    if is_first():
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    raise SystemExit(2)


def say(message):
    if is_first():
        print_log(message, logger='current', level=logging.WARNING)


def add_options(parser):
    """The options that mmdet's train.py and test.py have in common."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go [work_dirs/<config>]')
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it; torchrun sets the environment variable itself.
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )


def add_cfg_options(parser):
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override the config, for example train_dataloader.batch_size=1 key=a,b '
        'key="[(a,b),(c,d)]"',
    )


def read_config(args):
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not Path(args.config).is_file():
        stop(f'there is no config file {args.config}')
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def check_data(cfg, loaders):
    """Stop unless the folders and lists that these data loaders read are there.

    Data that are no local files (an address such as ``s3://``) are left to mmengine.
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


def is_sharded(cfg):
    """Whether the config spreads its model over processes."""
    return 'FSDP' in cfg.get('strategy', {}).get('type', '')


def fit_machine(cfg):
    """Without an accelerator, replace what needs one, and say so; join the other processes."""
    if get_device() != 'cpu':
        return
    if cfg.get('optim_wrapper', {}).get('type') == 'AmpOptimWrapper':
        say("No GPU: training in float32, since mmengine's AmpOptimWrapper needs one.")
        cfg.optim_wrapper = ConfigDict(
            {k: v for k, v in cfg.optim_wrapper.items() if k not in ('loss_scale', 'dtype')},
            type='OptimWrapper',
        )
    if cfg.launcher == 'none':
        return
    if is_sharded(cfg):
        # FSDP's own device would be an accelerator; a copy to the CPU would free what it copies.
        cfg.strategy.model_wrapper.device_id = 'cpu'
        cfg.strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
        )
    if cfg.launcher != 'pytorch':
        stop(f'--launcher {cfg.launcher} needs GPUs; without one use --launcher pytorch (torchrun)')
    say('No GPU: several processes work together through gloo instead of nccl.')
    # The Runner takes a process group that it finds; its own way begins with CUDA.
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    if _replace_type(cfg.model, 'SyncBN', 'BN'):
        say('No GPU: BN takes the place of SyncBN; each process normalises its own images.')


def _replace_type(node, old, new):
    """Replace every ``type=old`` below `node`; return how many there were."""
    if isinstance(node, (list, tuple)):
        return sum(_replace_type(child, old, new) for child in node)
    if not isinstance(node, dict):
        return 0
    hit = node.get('type') == old
    if hit:
        node['type'] = new
    return hit + sum(_replace_type(child, old, new) for child in node.values())


def build_runner(cfg):
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
