"""Train with a random image size at each iteration, and fail if memory keeps growing.

Each family's demo detector trains in a new process on generated images, which are resized to random
heights and widths. After each iteration the process's resident memory and its allocated memory
(glibc's count) are recorded. The command leaves FAMILY.json and memory.png in work_dirs/soak, and
ends with status 1 if either grew after the warm-up. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import mmattn  # noqa: F401  registers the backbones

from .charts import plot_memory
from .measuring import MIB, ROOT, make_images, resident

HELP = 'training with random image sizes: does memory grow?'
FAMILIES = ('gcvit', 'dat', 'quadtree')
SIDES = range(64, 193, 8)
# MiB in 100 iterations. Caching a position grid of 56 x 56 for each image size makes 2.4. Resident
# memory grows a little even where nothing is cached: free memory is fragmented.
LIMITS = dict(allocated=1.0, resident=10.0)

Record = dict[str, list]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--families', nargs='+', choices=FAMILIES, default=FAMILIES, help='[all of them]'
    )
    parser.add_argument('--iters', type=int, default=500, help='training iterations [500]')
    parser.add_argument(
        '--warm-up', type=int, default=250, help='iterations in which memory may grow [250]'
    )
    parser.add_argument('--work-dir', type=Path, default='work_dirs/soak', help='[work_dirs/soak]')
    parser.add_argument('--data', default='data/soak/coco', help='made if needed [data/soak/coco]')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train each family, write its record and the chart, and end with status 1 on growth."""
    if not 0 <= args.warm_up <= args.iters - 10:
        sys.exit(
            f'--iters must be at least 10 more than --warm-up, got {args.iters} and {args.warm_up}'
        )
    make_images(Path(args.data), train=64, val=1)
    os.environ['MMATTN_COCO'] = args.data
    # Otherwise glibc raises this threshold to the largest freed block and serves smaller ones from
    # its heap, which fragments and keeps growing for long though nothing is held.
    os.environ.setdefault('MALLOC_MMAP_THRESHOLD_', str(65536))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    records = {}
    for family in args.families:
        with multiprocessing.get_context('spawn').Pool(1) as pool:  # a fresh process's memory
            records[family] = pool.apply(train, (family, args.iters, args.work_dir / family))
        (args.work_dir / f'{family}.json').write_text(json.dumps(records[family]))
    title = f'{args.iters} training iterations, each with a random image size'
    plot_memory(records, args.warm_up, title).savefig(args.work_dir / 'memory.png')
    print(f'Wrote {args.work_dir}/memory.png and {", ".join(records)}.json beside it')
    within = [report(family, record, args.warm_up) for family, record in records.items()]
    sys.exit(not all(within))


def train(family: str, iters: int, work_dir: Path) -> Record:
    """Train the demo of a family with images of random sizes; return the probe's record."""
    cfg = Config.fromfile(ROOT / f'configs/{family}/demo_cascade_mask_rcnn_{family}.py')
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=0)
    sizes = list(itertools.product(SIDES, SIDES))
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[2] = dict(type='RandomChoiceResize', scales=sizes, keep_ratio=False)
    # No padding to a multiple of 32: the backbone gets every size.
    cfg.model.data_preprocessor.pad_size_divisor = 1
    # One process, so that the memory of data loading counts.
    cfg.train_dataloader.update(
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='InfiniteSampler'),
        batch_sampler=None,
    )
    cfg.train_cfg = dict(by_epoch=False, max_iters=iters)
    cfg.log_processor.by_epoch = False
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=100)]
    for part in ('val', 'test'):
        for name in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{part}_{name}'] = None
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(cfg)
    probe = MemoryProbe()
    runner.register_hook(probe, 'LOWEST')
    runner.train()
    return probe.record


class MemoryProbe(Hook):
    """Record ``allocated`` and ``resident`` bytes, image ``size`` and ``loss`` after each step."""

    def __init__(self) -> None:
        self.record: Record = dict(allocated=[], resident=[], size=[], loss=[])

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        sample = dict(
            allocated=allocated(),
            resident=resident(),
            size=list(data_batch['inputs'][0].shape[1:]),
            loss=outputs['loss'].item(),
        )
        for name, value in sample.items():
            self.record[name].append(value)


class MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd',
            'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost',
        )
    ]  # fmt: skip


def allocated() -> int:
    """Bytes that malloc has allocated in this process, in its heaps and by mmap."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def report(family: str, record: Mapping[str, Sequence], warm_up: int) -> bool:
    """Print the growth of memory after the warm-up; return True if it is within the limits."""
    rates = {name: growth(record[name][warm_up:]) for name in LIMITS}
    within = all(rates[name] <= LIMITS[name] for name in LIMITS)
    figures = [
        f'{name} {record[name][-1] / MIB:.0f} MiB at the end, '
        f'{rates[name]:+.2f} MiB in 100 iterations (limit {LIMITS[name]})'
        for name in LIMITS
    ]
    sizes = len(set(map(tuple, record['size'])))
    print(f'{family}: {sizes} sizes, {"; ".join(figures)}: {"constant" if within else "GROWS"}')
    return within


def growth(values: Sequence[float]) -> float:
    """Least-squares slope of values in bytes, in MiB per 100 iterations."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) * 100 / MIB
