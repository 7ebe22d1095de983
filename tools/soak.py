"""Trains with a random image size at each iteration, and fails if memory keeps growing.

    python tools/soak.py --iters 500

Each family's demo detector trains in a process of its own on generated images, which are resized to random
heights and widths. After each iteration are recorded the process's resident memory and what is allocated in
it (glibc's count). It leaves FAMILY.json and memory.png in work_dirs/soak, and ends with status 1 if either
grew after the warm-up. Linux only.
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from make_demo_dataset import make_dataset
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import mmattn  # noqa: F401  registers the backbones
from mmattn.visualization import plot_memory

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ('gcvit', 'dat', 'quadtree')
SIDES = range(64, 193, 8)
MIB = 2**20
# MiB in 100 iterations. A position grid of 56 x 56 that is kept for each image size makes 2.4. What is resident
# creeps towards its end where nothing is held: free memory lies between blocks that are in use.
LIMITS = dict(allocated=1.0, resident=10.0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--families', nargs='+', choices=FAMILIES, default=FAMILIES, help='[all of them]'
    )
    parser.add_argument('--iters', type=int, default=500, help='training iterations [500]')
    parser.add_argument(
        '--warm-up', type=int, default=250, help='iterations in which memory may grow [250]'
    )
    parser.add_argument('--work-dir', type=Path, default='work_dirs/soak', help='[work_dirs/soak]')
    parser.add_argument('--data', default='data/soak/coco', help='made if needed [data/soak/coco]')
    args = parser.parse_args()
    if not 0 <= args.warm_up <= args.iters - 10:
        parser.error('--iters must be at least 10 more than --warm-up')
    return args


def main():
    args = parse_args()
    make_dataset(args.data, train=64, val=1)
    os.environ['MMATTN_COCO'] = args.data
    # Otherwise glibc raises this threshold to the largest block that was freed, and takes blocks below it from
    # its heap: that breaks into pieces of all sizes and keeps growing for long though nothing is held.
    os.environ.setdefault('MALLOC_MMAP_THRESHOLD_', str(65536))
    records = {}
    for family in args.families:
        # Memory is a process's: a new one for each family.
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            records[family] = pool.apply(train, (family, args.iters, args.work_dir / family))
        (args.work_dir / f'{family}.json').write_text(json.dumps(records[family]))
    title = f'{args.iters} training iterations, each with a random image size'
    plot_memory(records, args.warm_up, title).savefig(args.work_dir / 'memory.png')
    print(f'Wrote {args.work_dir}/memory.png and {", ".join(records)}.json beside it')
    within = [report(family, record, args.warm_up) for family, record in records.items()]
    sys.exit(not all(within))


def train(family, iters, work_dir):
    """Train the demo of a family with images of random sizes.

    Returns:
        What :class:`MemoryProbe` recorded.
    """
    cfg = Config.fromfile(ROOT / f'configs/{family}/demo_cascade_mask_rcnn_{family}.py')
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=0)
    sizes = list(itertools.product(SIDES, SIDES))
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[2] = dict(type='RandomChoiceResize', scales=sizes, keep_ratio=False)
    # No padding to a multiple of 32: the backbone meets all sizes.
    cfg.model.data_preprocessor.pad_size_divisor = 1
    # One process, so that what loads the data is watched too.
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
    """Keeps, after each iteration, bytes ``allocated`` and ``resident``, the image's ``size`` and the ``loss``."""

    def __init__(self):
        self.record = dict(allocated=[], resident=[], size=[], loss=[])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
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


def allocated():
    """Bytes that malloc has given out in this process: from its heaps, and mapped."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident():
    """Bytes of this process that are in memory."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def report(family, record, warm_up):
    """Print by how much memory grew after the warm-up; return whether that is within the limits."""
    rates = {name: growth(record[name][warm_up:]) for name in LIMITS}
    within = all(rates[name] <= LIMITS[name] for name in LIMITS)
    figures = [
        f'{name} {record[name][-1] / MIB:.0f} MiB at the end, {rates[name]:+.2f} MiB in 100 iterations '
        f'(limit {LIMITS[name]})'
        for name in LIMITS
    ]
    sizes = len(set(map(tuple, record['size'])))
    print(f'{family}: {sizes} sizes, {"; ".join(figures)}: {"constant" if within else "GROWS"}')
    return within


def growth(values):
    """Slope of the line of least squares through values in bytes, in MiB per 100 iterations."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) * 100 / MIB


if __name__ == '__main__':
    main()
