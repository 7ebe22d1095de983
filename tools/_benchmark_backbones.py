"""Whole backbones: forward (evaluation mode, no gradients) and training step, at the sizes of classification
(224 x 224, batch 64; on the CPU 4) and of detection (800 x 1344, batch 2; on the CPU 512 x 672, batch 1).

TFLOP/s are those of the step, taken as three times the operations of forward. Memory is what a step takes at its
peak beyond the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from _measuring import choose, figure, peak_memory, seconds, served_by
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmattn.backbones import DAT, GCViT, QuadTree
from mmattn.visualization import plot_steps

HELP = 'whole backbones'
DTYPE = dict(cpu='float32', cuda='bfloat16')
HEADER = (
    '| backbone | operators | forward ms | images/s | step ms | images/s | memory MiB | TFLOP/s '
    '| step, of literal |\n|---|---|' + '---|' * 7
)
CLASSIFICATION, DETECTION = '224', 'det'
SHAPES = {
    'cpu': {CLASSIFICATION: (4, 3, 224, 224), DETECTION: (1, 3, 512, 672)},
    'cuda': {CLASSIFICATION: (64, 3, 224, 224), DETECTION: (2, 3, 800, 1344)},
}

# Class, its options, and those that differ in the published classifiers and detectors.
_GCVIT = {DETECTION: dict(window_size=(24,) * 4)}
_QUADTREE = {
    CLASSIFICATION: dict(topks=8, value_act='GELU'),
    DETECTION: dict(topks=32, value_act='ReLU'),
}
BACKBONES = {
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

LITERAL, COMPILED, FUSED, PEER = 'literal', 'compiled', 'compiled, compile_blocks', "timm's"


def _fused_attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# torch's counter has no formula for scaled_dot_product_attention's fused CPU kernel.
FUSED_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}


@dataclass
class Row:
    """A backbone at one size; times in ms, memory in MiB, None where memory did not suffice."""

    name: str
    operators: str
    batch: int
    forward: float | None = None
    step: float | None = None
    memory: float | None = None
    tflops: float | None = None


def build(name: str, kind: str, **options) -> nn.Module:
    backbone, arch, differing = BACKBONES[name]
    return backbone(arch, **differing.get(kind, {}), **options)


def build_peer(name: str, size: tuple[int, int]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise SystemExit(f'--peers needs timm ({error}): pip install timm') from error
    timm_name, drop_path_rate = PEERS[name]
    options = dict(img_size=size, strict_img_size=False) if name.startswith('Swin') else {}
    return timm.create_model(
        timm_name, features_only=True, drop_path_rate=drop_path_rate, **options
    )


def measure(row: Row, model: nn.Module, x: torch.Tensor, dtype: str) -> None:
    """Fills the row in."""
    device = x.device.type
    autocast = dict(device_type=device, dtype=getattr(torch, dtype), enabled=dtype != 'float32')

    def forward():
        with torch.no_grad(), torch.autocast(**autocast):
            return model(x)

    def step():
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


def line(row: Row, literal: Row | None) -> str:
    ratio = ''
    if literal is not None and None not in (row.step, literal.step):
        ratio = f'{row.step / literal.step:.2f}'
    cells = [row.name, row.operators]
    for time in (row.forward, row.step):
        cells += ['-', '-'] if time is None else [figure(time), figure(row.batch / time * 1e3)]
    cells += ['out of memory' if row.memory is None else f'{row.memory:.0f}']
    cells += ['-' if row.tflops is None else figure(row.tflops), ratio]
    return f'| {" | ".join(cells)} |'


def cases(args) -> dict[str, list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]]:
    """Name -> for each way to run it: operators, constructor and shape of the images."""
    found = {}
    for kind, shape in SHAPES[args.device].items():
        for name in BACKBONES:
            ways = [LITERAL, COMPILED] + [FUSED] * args.compile
            found[f'{name}, {kind}'] = [
                (
                    way,
                    lambda name=name, kind=kind, way=way: build(
                        name, kind, compile_blocks=way == FUSED
                    ),
                    shape,
                )
                for way in ways
            ]
        for name in PEERS if args.peers else ():
            found[f'{name}, {kind}'] = [
                (PEER, lambda name=name, size=shape[2:]: build_peer(name, size), shape)
            ]
    return found


def add_options(parser) -> None:
    parser.add_argument(
        '--peers', action='store_true', help=f"timm's {', '.join(PEERS)}, too (pip install timm)"
    )
    parser.add_argument('--compile', action='store_true', help='with compile_blocks=True, too')


def run(args, machine, about: str):
    """Measures the chosen backbones: rows for the JSON file, a chart, and the last sentence."""
    chosen = choose(cases(args), args.only)
    print(HEADER, flush=True)
    rows = []
    for name, ways in chosen.items():
        literal = None
        for operators, make, shape in ways:
            torch.manual_seed(0)
            row = Row(name, operators, batch=shape[0])
            with served_by('reference' if operators == LITERAL else 'auto'):
                measure(row, make(), torch.randn(shape, device=args.device), args.dtype)
            gc.collect()
            literal = row if operators == LITERAL else literal
            print(line(row, literal), flush=True)
            rows.append(row)
    chart = plot_steps([(r.name, r.operators, r.step, r.memory) for r in rows], about)
    return [asdict(row) for row in rows], chart, f'{len(rows)} measured'
