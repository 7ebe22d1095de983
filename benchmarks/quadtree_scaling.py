"""Cost of QuadTree attention and of full attention on maps of growing size, as a chart.

The attention is that of QuadTree-b1's first stage: 64 channels, one head, four levels, type B. A
step is forward and backward on one image, on one thread of the CPU; its time is CPU time, so that
other jobs on the machine matter little. Every size runs in a new process, whose peak memory is
counted from before the step. The figures are left beside the chart, as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.attention import QuadTreeAttention, quadtree_attention

from .charts import Curve, plot_scaling
from .measuring import processor, resident

HELP = 'QuadTree attention and full attention on maps of growing size'

DIM, HEADS, LEVELS = 64, 1, 4
TOPKS = (8, 32)
MATRIX = 'full, the matrix stored'
FUSED = 'full, fused'
# The largest maps that full attention is measured on: 1 GiB for a matrix at 128 x 128.
LIMITS = {MATRIX: 128, FUSED: 256}
REPEATS, ENOUGH = 3, 20.0  # repeats of a step, and seconds after which there are no more


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--out', type=Path, default='docs/quadtree_scaling.png', help='the chart')
    parser.add_argument(
        '--sides',
        type=int,
        nargs='+',
        default=[32, 48, 64, 96, 128, 192, 256],
        help='of the maps, multiples of 8 [32 48 64 96 128 192 256]',
    )
    parser.add_argument(
        '--draw-only', action='store_true', help='draw the figures of an earlier run'
    )
    parser.set_defaults(run=run)


class FullAttention(nn.Module):
    """Attention of all tokens to all tokens, with the same projections; (B, H, W, C) in and out."""

    def __init__(self, fused: bool):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, H*W, d) each
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape_as(x))


def build(name: str) -> nn.Module:
    """Build the attention module of a curve."""
    if name in LIMITS:
        return FullAttention(fused=name == FUSED)
    topks = int(name.split('= ')[1])
    return QuadTreeAttention(
        DIM, HEADS, LEVELS, topks, value_act='ReLU', lepe=True, level_weights=True
    )


def measure(name: str, side: int) -> tuple[float, int]:
    """CPU seconds and added bytes of a training step, to be called in a new process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = build(name)

    def step(side: int) -> float:
        x = torch.randn(1, side, side, DIM, requires_grad=True)
        start = time.process_time()
        module(x).square().mean().backward()
        return time.process_time() - start

    step(16)  # loads libraries
    before = resident()
    times = [step(side)]
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    while len(times) < REPEATS and sum(times) < ENOUGH:
        times.append(step(side))
    return min(times), added


def measure_all(sides: Sequence[int]) -> dict[str, dict[str, list]]:
    """Curve name -> {'tokens', 'seconds', 'bytes'}."""
    curves: dict[str, dict[str, list]] = {}
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        for name in (*(f'QuadTree, K = {topk}' for topk in TOPKS), FUSED, MATRIX):
            curve = curves[name] = dict(tokens=[], seconds=[], bytes=[])
            for side in sides:
                if side > LIMITS.get(name, side):
                    continue
                seconds, added = pool.apply(measure, (name, side))
                print(f'{name:24} {side:4} x {side}: {seconds:8.3f} s {added / 2**20:8.1f} MiB')
                for key, value in dict(tokens=side**2, seconds=seconds, bytes=added).items():
                    curve[key].append(value)
    return curves


def measure_error(
    deviations: Sequence[int] = (1, 2, 4),
    topks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    draws: int = 4,
) -> dict[str, Curve]:
    """Curve name -> (K, error relative to full attention) of the finest level's message alone.

    Smooth random queries and keys of 32 x 32 tokens, 4 heads of 16 channels, three levels. The
    values of the coarser levels are zero, so only the kept keys contribute. The larger the scores'
    standard deviation, the fewer keys carry the attention.
    """
    curves: dict[str, Curve] = {}
    for deviation in deviations:
        errors = torch.zeros(len(topks))
        for seed in range(draws):
            torch.manual_seed(seed)
            q, k = (pyramid(smooth_map() * deviation**0.5) for _ in 'qk')
            v = [torch.randn(1, 64, 32, 32), torch.zeros(1, 64, 16, 16), torch.zeros(1, 64, 8, 8)]
            full = F.scaled_dot_product_attention(
                *(x[0].unflatten(1, (4, -1)).flatten(3).transpose(2, 3) for x in (q, k, v))
            ).transpose(1, 2)
            for i, topk in enumerate(topks):
                errors[i] += (quadtree_attention(q, k, v, 4, topk) - full).norm() / full.norm()
        curves[f"scores' standard deviation {deviation}"] = topks, (errors / draws).tolist()
    return curves


def smooth_map() -> Tensor:
    """(1, 64, 32, 32) of variance 1, with similar neighboring tokens."""
    x = F.avg_pool2d(torch.randn(1, 64, 40, 40), 9, 1)
    return x / x.std()


def pyramid(x: Tensor) -> list[Tensor]:
    """The map and two coarser levels."""
    return [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]


def run(args: argparse.Namespace) -> None:
    """Measure, or read an earlier run's figures, and draw the chart."""
    if any(side % 2 ** (LEVELS - 1) for side in args.sides):
        sys.exit(f'--sides must be multiples of {2 ** (LEVELS - 1)}, got {args.sides}')
    numbers = args.out.with_suffix('.json')
    if args.draw_only:
        found = json.loads(numbers.read_text())
    else:
        found = dict(torch=torch.__version__, processor=processor(), curves=measure_all(args.sides))
        found['error'] = measure_error()
        numbers.write_text(json.dumps(found, indent=1) + '\n')
    curves = found['curves']
    figure = plot_scaling(
        {name: (curve['tokens'], curve['seconds']) for name, curve in curves.items()},
        {name: (curve['tokens'], curve['bytes']) for name, curve in curves.items()},
        found['error'],
        'QuadTree attention and full attention: cost by map size, error by kept keys',
        f'{DIM} channels, {HEADS} head, {LEVELS} levels, float32, batch 1, one thread of '
        f'{found["processor"]}, torch {found["torch"]}; '
        'right: 32×32 tokens, 3 levels, finest message, mean of 4 draws',
    )
    figure.savefig(args.out)
    print(f'{args.out}, {numbers}')
