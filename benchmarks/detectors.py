"""Mask R-CNN: a whole training step (losses, backward, AdamW) and inference, beside mmdet's
Swin-T and R50.

Images come from a data set in COCO's layout, or are generated; all detectors get the same ones, in
the same size.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS

import mmattn  # noqa: F401  registers the backbones

from .charts import plot_steps
from .measuring import (
    ROOT,
    Machine,
    Table,
    choose,
    figure,
    make_images,
    peak_memory,
    seconds_once,
)

HELP = 'whole detectors'
DTYPE = dict(cpu='float32', cuda='float16')  # mmcv's operators know no bfloat16
HEADER = (
    '| detector | step ms | images/s | memory of a step MiB | inference ms | images/s |\n|---|'
    + '---|' * 5
)
CONFIGS = ROOT / 'configs'
DETECTORS = {
    'Mask R-CNN GC ViT-T': CONFIGS / 'gcvit/mask_rcnn_gcvit_t_coco.py',
    'Mask R-CNN DAT-T': CONFIGS / 'dat/mask_rcnn_dat_t_1x_coco.py',
    'Mask R-CNN DAT-T++': CONFIGS / 'dat/mask_rcnn_dat_tpp_1x_coco.py',
    'Mask R-CNN QuadTree-B2': CONFIGS / 'quadtree/mask_rcnn_quadtree_b2_1x_coco.py',
    'Mask R-CNN Swin-T (mmdet)': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'Mask R-CNN R50 (mmdet)': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
}
SCALES = {'cpu': (672, 512), 'cuda': (1344, 800)}
BATCHES = {'cpu': 1, 'cuda': 2}
IMAGES = 8  # a figure is the median over them


@dataclass
class Row:
    """A detector; times in ms, memory in MiB above the weights and the optimizer's state."""

    name: str
    batch: int
    step: float
    memory: float
    inference: float


def load_images(root: Path, scale: tuple[int, int]) -> list[dict]:
    """The first images of a COCO data set that have instances, resized to fit into ``scale``."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='Resize', scale=scale, keep_ratio=True),
        dict(type='PackDetInputs'),
    ]
    annotations = root / 'annotations/instances_train2017.json'
    categories = json.loads(annotations.read_text())['categories']
    dataset = DATASETS.build(
        dict(
            type='mmdet.CocoDataset',
            metainfo=dict(classes=[category['name'] for category in categories]),
            data_root=str(root),
            ann_file=str(annotations),
            data_prefix=dict(img='train2017/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=pipeline,
        )
    )
    return [dataset[i] for i in range(min(IMAGES, len(dataset)))]


def batches(images: list[dict], size: int) -> Iterator[dict]:
    """Endless batches of the images."""
    groups = [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
    return itertools.cycle([pseudo_collate(group) for group in groups])


def measure(name: str, images: list[dict], args: argparse.Namespace) -> Row:
    """Build a detector with random weights and measure it."""
    path = str(DETECTORS[name])
    config = get_config(path) if '::' in path else Config.fromfile(path)
    config.model.backbone.init_cfg = None  # random weights: nothing is downloaded
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.to(args.device)
    autocast = dict(
        device_type=args.device, dtype=getattr(torch, args.dtype), enabled=args.dtype != 'float32'
    )
    if autocast['enabled']:
        config.optim_wrapper.update(type='AmpOptimWrapper', dtype=args.dtype)
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    size = BATCHES[args.device]
    training, testing = batches(images, size), batches(images, 1)

    def step() -> None:
        model.train_step(next(training), optimizer)

    def infer() -> None:
        with torch.no_grad(), torch.autocast(**autocast):
            model.test_step(next(testing))

    def median(function: Callable[[], None]) -> float:
        function()
        return statistics.median(seconds_once(function) for _ in images) * 1e3

    model.train()
    time = median(step)
    memory = peak_memory(step, args.device)
    model.eval()
    return Row(name, size, time, memory, median(infer))


def line(row: Row) -> str:
    """The row of the Markdown table."""
    cells = [
        row.name,
        figure(row.step),
        figure(row.batch / row.step * 1e3),
        f'{row.memory:.0f}',
        figure(row.inference),
        figure(1e3 / row.inference),
    ]
    return f'| {" | ".join(cells)} |'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--coco',
        type=Path,
        default=Path(os.environ['MMATTN_COCO']) if 'MMATTN_COCO' in os.environ else None,
        help="a data set in COCO's layout [$MMATTN_COCO, or generated images]",
    )


def run(args: argparse.Namespace, machine: Machine, about: str) -> Table:
    """Measure the chosen detectors."""
    from mmdet.utils import register_all_modules  # slow, and no other command needs it

    register_all_modules()
    MMLogger.get_current_instance().setLevel('WARNING')  # a line for each parameter, otherwise
    chosen = choose(DETECTORS, args.only)
    with tempfile.TemporaryDirectory() as folder:
        if args.coco is None:
            make_images(Path(folder), train=IMAGES, val=1, size=512)
        images = load_images(args.coco or Path(folder), SCALES[args.device])
    width, height = SCALES[args.device]
    print(
        f'{len(images)} images of {args.coco or "the generator"}, within {width} x {height}; '
        f'batch {BATCHES[args.device]}, inference 1\n{HEADER}',
        flush=True,
    )
    rows = []
    for name in chosen:
        rows.append(measure(name, images, args))
        print(line(rows[-1]), flush=True)
        gc.collect()
    chart = plot_steps([(row.name, 'detector', row.step, row.memory) for row in rows], about)
    return Table([asdict(row) for row in rows], chart, f'{len(rows)} measured')
