"""Training on several processes, and recomputation against memory.

    training processes [--only detector|classifier] [--steps 6]
    training checkpointing [--size 512x672] [--batch 1] [--device cpu|cuda]

`processes` trains GC ViT-XXT on generated images by tools/dist_train.sh: a Mask R-CNN on one image
of 384 x 384 a process, and a classifier on eight of 224 x 224. `checkpointing` times a step,
forward and backward, of the three families with and without `with_cp`. Tables are printed; runs
are left in work_dirs/benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mmattn.backbones import DAT, GCViT, QuadTree

from .measuring import ROOT, TOOLS, make_images, peak_memory, processor, seconds_once

HELP = 'several processes; recomputation against memory'
OUTPUT = Path('work_dirs/benchmark')
WARMUP = 2  # steps that are not counted

COMMON = """
train_dataloader = dict(
    batch_size={batch}, num_workers=0, persistent_workers=False, dataset=dict({dataset})
)
val_dataloader = val_cfg = val_evaluator = None
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={steps})
param_scheduler = None
log_processor = dict(window_size=1, by_epoch=False)
default_hooks = dict(logger=dict(interval=1))
"""
DETECTOR = """
_base_ = '{configs}/gcvit/mask_rcnn_gcvit_t_coco.py'
model = dict(
    backbone=dict(arch='xxtiny', init_cfg=None),  # random weights: nothing is downloaded
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),  # of 512: the heads would hide the backbone
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(384, 384), keep_ratio=True),
    dict(type='PackDetInputs'),
]
classes = ('circle', 'triangle', 'square', 'star', 'ring', 'crescent')
"""
CLASSIFIER = """
_base_ = '{configs}/gcvit/gcvit_xxt_imagenet.py'
"""


class Job(NamedTuple):
    """A training: config, images a process, layout and side of the images, data set options."""

    config: str
    batch: int
    layout: str
    side: int
    dataset: str


JOBS = {
    'detector': Job(
        DETECTOR, 1, 'coco', 384, 'pipeline=train_pipeline, metainfo=dict(classes=classes)'
    ),
    'classifier': Job(CLASSIFIER, 8, 'imagenet', 256, ''),
}
SETTINGS = [(1, 1), (1, 2), (2, 1)]  # processes, threads of each; with a GPU, threads do not matter

BACKBONES: dict[str, Callable[[bool], nn.Module]] = {
    'GC ViT-T, window 24': lambda cp: GCViT('tiny', window_size=(24,) * 4, with_cp=cp),
    'DAT-T++': lambda cp: DAT('tiny++', with_cp=cp),
    'QuadTree-b2': lambda cp: QuadTree('b2', with_cp=cp),
}


def train(
    config: Path, data: dict[str, str], processes: int, threads: int
) -> tuple[list[float], float]:
    """Run dist_train.sh; return the seconds of each step and the largest process's peak in MiB."""
    work_dir = OUTPUT / f'{config.stem}_{processes}x{threads}'
    shutil.rmtree(work_dir, ignore_errors=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    environment = dict(
        os.environ, **data, OMP_NUM_THREADS=str(threads), PORT=port, PYTHON=sys.executable
    )
    command = [str(TOOLS / 'dist_train.sh'), str(config), str(processes)]
    command += ['--work-dir', str(work_dir)]
    log = work_dir.with_suffix('.log')
    with log.open('w') as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f'training with {processes} processes failed; see {log}')
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    steps = [entry['time'] for entry in map(json.loads, lines) if 'loss' in entry]
    return steps[WARMUP:], usage.ru_maxrss / 1024


def processes(args: argparse.Namespace) -> None:
    """Print the time of a step and the peak memory for each of SETTINGS."""
    print('\n| job | processes | threads of each | step, s | images/s | peak of a process, MiB |')
    print('|---|---|---|---|---|---|', flush=True)
    for name in [args.only] if args.only else JOBS:
        job = JOBS[name]
        folder = OUTPUT / job.layout
        if not folder.exists():
            make_images(folder, format=job.layout, train=64, size=job.side)
        config = OUTPUT / f'{name}.py'
        text = (job.config + COMMON).format(
            configs=ROOT / 'configs',
            batch=job.batch,
            dataset=job.dataset,
            steps=args.steps + WARMUP,
        )
        config.write_text(text)
        data = {f'MMATTN_{job.layout.upper()}': str(folder.resolve())}
        for count, threads in SETTINGS:
            steps, memory = train(config, data, count, threads)
            step = statistics.median(steps)
            print(
                f'| {name} | {count} | {threads} | {step:.2f} | {count * job.batch / step:.2f} '
                f'| {memory:.0f} |',
                flush=True,
            )


def checkpointing(args: argparse.Namespace) -> None:
    """Print time and memory of a step with and without recomputation."""
    height, width = map(int, args.size.split('x'))
    x = torch.randn(args.batch, 3, height, width, device=args.device)
    print(
        '\n| backbone | step: stored, s | recomputed, s | ratio '
        '| memory: stored, MiB | recomputed, MiB | ratio |\n|---|---|---|---|---|---|---|',
        flush=True,
    )
    for name, build in BACKBONES.items():
        times: list[float] = []
        peaks: list[float] = []
        for with_cp in (False, True):
            torch.manual_seed(0)
            backbone = build(with_cp).to(args.device).train()

            def step(backbone: nn.Module = backbone) -> None:
                sum(level.square().mean() for level in backbone(x)).backward()

            step()  # allocates the gradients
            peaks.append(peak_memory(step, args.device))
            times.append(statistics.median(seconds_once(step) for _ in range(args.steps)))
        print(
            f'| {name} | {times[0]:.2f} | {times[1]:.2f} | {times[1] / times[0]:.2f} '
            f'| {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.2f} |',
            flush=True,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest='what', required=True)
    command = commands.add_parser('processes', help='steps on one process and on two')
    command.add_argument('--only', choices=JOBS, help='[both]')
    command.add_argument('--steps', type=int, default=6, help='measured steps [6]')
    command.set_defaults(run=run, measure=processes)
    command = commands.add_parser('checkpointing', help='with_cp: time against memory')
    command.add_argument('--size', default='512x672', help='height x width of the images [512x672]')
    command.add_argument('--batch', type=int, default=1, help='[1]')
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='[cpu]')
    command.add_argument('--steps', type=int, default=3, help='measured steps [3]')
    command.set_defaults(run=run, measure=checkpointing)


def run(args: argparse.Namespace) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print(f'{processor()}, torch {torch.__version__}; {torch.get_num_threads()} threads here')
    args.measure(args)
