"""Whole backbones: forward (evaluation mode, no gradients) and training step.

Sizes are those of classification (224 x 224, batch 64; on the CPU 4) and of detection (800 x 1344,
batch 2; on the CPU 512 x 672, batch 1). TFLOP/s are those of the step, taken as three times the
operations of forward. Memory is the peak of a step above the weights.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmattn.backbones import DAT, GCViT, QuadTree

from .charts import plot_steps
from .measuring import Machine, Table, choose, figure, ops_mode, peak_memory, seconds

HELP = 'whole backbones'
DTYPE = dict(cpu='float32', cuda='bfloat16')
HEADER = (
    '| backbone | operators | forward ms | images/s | step ms | images/s | memory MiB | TFLOP/s '
    '| step, of reference |\n|---|---|' + '---|' * 7
)
CLASSIFICATION, DETECTION = '224', 'det'
SHAPES = {
    'cpu': {CLASSIFICATION: (4, 3, 224, 224), DETECTION: (1, 3, 512, 672)},
    'cuda': {CLASSIFICATION: (64, 3, 224, 224), DETECTION: (2, 3, 800, 1344)},
}

# Options that differ between the published classifiers and detectors.
_GCVIT: dict[str, dict] = {DETECTION: dict(window_size=(24,) * 4)}
_QUADTREE = {
    CLASSIFICATION: dict(topks=8, value_act='GELU'),
    DETECTION: dict(topks=32, value_act='ReLU'),
}
# Name -> class, arch, options that differ.
BACKBONES: dict[str, tuple[type[nn.Module], str, dict]] = {
    'GC ViT-T': (GCViT, 'tiny', _GCVIT),
    'GC ViT-S': (GCViT, 'small', _GCVIT),
    'GC ViT-B': (GCViT, 'base', _GCVIT),
    'DAT-T': (DAT, 'tiny', {}),
    'DAT-S': (DAT, 'small', {}),
    'DAT-B': (DAT, 'base', {}),
    'DAT-T++': (DAT, 'tiny++', {}),
    'DAT-S++': (DAT, 'small++', {}),
    'DAT-B++': (DAT, 'base++', {}),
    'QuadTree-B2': (QuadTree, 'b2', _QUADTREE),
    'QuadTree-B3': (QuadTree, 'b3', _QUADTREE),
    'QuadTree-B4': (QuadTree, 'b4', _QUADTREE),
}

# timm's names, with the stochastic depth that they are trained with.
PEERS = {
    'Swin-T': ('swin_tiny_patch4_window7_224', 0.2),
    'ConvNeXt-T': ('convnext_tiny', 0.1),
    'PVTv2-B2': ('pvt_v2_b2', 0.1),
    'ResNet-50': ('resnet50', 0.0),
}

REFERENCE, COMPILED, FUSED, PEER = 'reference', 'compiled', 'compiled, compile_blocks', "timm's"


# Operators, constructor and shape of the images.
Shape = tuple[int, int, int, int]
Way = tuple[str, Callable[[], nn.Module], Shape]


def _fused_attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# torch's counter has no formula for scaled_dot_product_attention's fused CPU kernel.
FUSED_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}


@dataclass
class Row:
    """A backbone at one size; times in ms, memory in MiB, None where it ran out of memory."""

    name: str
    operators: str
    batch: int
    forward: float | None = None
    step: float | None = None
    memory: float | None = None
    tflops: float | None = None


def build(name: str, kind: str, **options: object) -> nn.Module:
    """Build a backbone with the options of CLASSIFICATION or DETECTION."""
    backbone, arch, differing = BACKBONES[name]
    return backbone(arch, **differing.get(kind, {}), **options)


def build_peer(name: str, size: tuple[int, int]) -> nn.Module:
    """Build timm's backbone of that name."""
    try:
        import timm  # type: ignore[import-not-found] # optional, for --peers
    except ImportError as error:
        raise SystemExit(f'--peers needs timm ({error}): pip install timm') from error
    timm_name, drop_path_rate = PEERS[name]
    options = dict(img_size=size, strict_img_size=False) if name.startswith('Swin') else {}
    return timm.create_model(
        timm_name, features_only=True, drop_path_rate=drop_path_rate, **options
    )


def measure(row: Row, model: nn.Module, x: torch.Tensor, dtype: str) -> None:
    """Fill in the figures of a row."""
    device = x.device.type
    autocast = dict(device_type=device, dtype=getattr(torch, dtype), enabled=dtype != 'float32')

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), torch.autocast(**autocast):
            return model(x)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(**autocast):
            loss = sum(out.float().mean() for out in model(x))
        loss.backward()

    model.to(device).eval()
    try:
        with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
            forward()
        row.forward = seconds(forward) * 1e3
        model.train()
        row.step = seconds(step) * 1e3
        model.zero_grad()
        row.memory = peak_memory(step, device)
    except torch.cuda.OutOfMemoryError:
        return
    row.tflops = 3 * counter.get_total_flops() / row.step * 1e-9


def line(row: Row, reference: Row | None) -> str:
    """The row of the Markdown table, compared with the reference operators' row."""
    ratio = ''
    if reference is not None and row.step is not None and reference.step is not None:
        ratio = f'{row.step / reference.step:.2f}'
    cells = [row.name, row.operators]
    for time in (row.forward, row.step):
        cells += ['-', '-'] if time is None else [figure(time), figure(row.batch / time * 1e3)]
    cells += ['out of memory' if row.memory is None else f'{row.memory:.0f}']
    cells += ['-' if row.tflops is None else figure(row.tflops), ratio]
    return f'| {" | ".join(cells)} |'


def cases(args: argparse.Namespace) -> dict[str, list[Way]]:
    """Name -> the ways to run it."""
    found: dict[str, list[Way]] = {}
    for kind, shape in SHAPES[args.device].items():
        for name in BACKBONES:
            ways = [REFERENCE, COMPILED] + [FUSED] * args.compile
            found[f'{name}, {kind}'] = [
                (way, partial(build, name, kind, compile_blocks=way == FUSED), shape)
                for way in ways
            ]
        for name in PEERS if args.peers else ():
            found[f'{name}, {kind}'] = [(PEER, partial(build_peer, name, shape[2:]), shape)]
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--peers', action='store_true', help=f"timm's {', '.join(PEERS)}, too (pip install timm)"
    )
    parser.add_argument('--compile', action='store_true', help='with compile_blocks=True, too')


def run(args: argparse.Namespace, machine: Machine, about: str) -> Table:
    """Measure the chosen backbones."""
    chosen = choose(cases(args), args.only)
    print(HEADER, flush=True)
    rows = []
    for name, ways in chosen.items():
        reference = None
        for operators, make, shape in ways:
            torch.manual_seed(0)
            row = Row(name, operators, batch=shape[0])
            with ops_mode('reference' if operators == REFERENCE else 'auto'):
                measure(row, make(), torch.randn(shape, device=args.device), args.dtype)
            gc.collect()
            reference = row if operators == REFERENCE else reference
            print(line(row, reference), flush=True)
            rows.append(row)
    chart = plot_steps([(r.name, r.operators, r.step, r.memory) for r in rows], about)
    return Table([asdict(row) for row in rows], chart, f'{len(rows)} measured')
