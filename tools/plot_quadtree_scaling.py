"""Measures what QuadTree attention costs on maps of growing size, beside full attention, and draws it.

    python tools/plot_quadtree_scaling.py --out docs/quadtree_scaling.png

The attention is that of QuadTree-b1's first stage: 64 channels, one head, four levels, type B. A step
is forward and backward on one image, on one thread of the CPU; its time is CPU time, so that other
jobs on the machine matter little. Every size has a process of its own, whose peak memory is counted
from what it had before the step. The numbers are left beside the picture, as JSON.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mmattn.attention import QuadTreeAttention, quadtree_attention
from mmattn.visualization import plot_scaling

DIM, HEADS, LEVELS = 64, 1, 4
TOPKS = (8, 32)
MATRIX = 'full, the matrix stored'
FUSED = 'full, fused'
# The largest maps that full attention is measured on: 1 GiB for a matrix at 128 x 128.
LIMITS = {MATRIX: 128, FUSED: 256}
REPEATS, ENOUGH = 3, 20.0  # a step is measured so often, unless it has taken so many seconds


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default='docs/quadtree_scaling.png', help='the picture')
    parser.add_argument(
        '--sides',
        type=int,
        nargs='+',
        default=[32, 48, 64, 96, 128, 192, 256],
        help='of the maps, multiples of 8 [32 48 64 96 128 192 256]',
    )
    parser.add_argument('--draw-only', action='store_true', help='draw what was measured before')
    args = parser.parse_args()
    if any(side % 2 ** (LEVELS - 1) for side in args.sides):
        parser.error(f'--sides must be multiples of {2 ** (LEVELS - 1)}, got {args.sides}')
    return args


class FullAttention(nn.Module):
    """Attention of all tokens to all tokens between the same projections, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, fused: bool):
        super().__init__()
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1)
        self.proj = nn.Conv2d(DIM, DIM, 1)
        self.fused = fused

    def forward(self, x):
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, -1)).transpose(3, 4).contiguous()
        q, k, v = qkv.unbind(1)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
        return self.proj(out.transpose(2, 3).reshape_as(x))


def build(name):
    if name in LIMITS:
        return FullAttention(fused=name == FUSED)
    options = dict(value_act='ReLU', lepe=True, level_weights=True)
    return QuadTreeAttention(DIM, HEADS, LEVELS, int(name.split('= ')[1]), **options)


def measure(name, side):
    """CPU seconds and added bytes of a training step; in a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = build(name)

    def step(side):
        x = torch.randn(1, DIM, side, side, requires_grad=True)
        start = time.process_time()
        module(x).square().mean().backward()
        return time.process_time() - start

    step(16)  # what is loaded on first use
    before = resident_bytes()
    times = [step(side)]
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    while len(times) < REPEATS and sum(times) < ENOUGH:
        times.append(step(side))
    return min(times), added


def resident_bytes():
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * resource.getpagesize()


def measure_all(sides):
    """Curve name -> {'tokens', 'seconds', 'bytes'}."""
    curves = {}
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


def measure_error(deviations=(1, 2, 4), topks=(1, 2, 4, 8, 16, 32, 64), draws=4):
    """Curve name -> (K, error relative to full attention) of the finest level's message alone.

    Smooth random queries and keys of 32 x 32 tokens, 4 heads of 16 channels, three levels. The values
    of the coarser levels are zero: what is left is what the kept keys let through. The larger the
    scores' standard deviation, the fewer keys carry the attention.
    """
    curves = {}
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


def smooth_map():
    """(1, 64, 32, 32) of variance 1, its neighbouring tokens alike."""
    x = F.avg_pool2d(torch.randn(1, 64, 40, 40), 9, 1)
    return x / x.std()


def pyramid(x):
    return [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]


def processor():
    info = Path('/proc/cpuinfo')
    names = [line.split(': ')[1] for line in info.read_text().splitlines() if 'model name' in line]
    return names[0] if names else platform.processor()


def main():
    args = parse_args()
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


if __name__ == '__main__':
    main()
