"""Backbones on one square image of growing side: whether time and memory grow with the number of pixels."""

from __future__ import annotations

import gc
from dataclasses import asdict

import torch
from _benchmark_backbones import COMPILED, DETECTION, Row, build, measure
from _measuring import choose, figure

from mmattn.visualization import plot_growth

HELP = 'backbones on images of growing size'
DTYPE = dict(cpu='float32', cuda='bfloat16')
NAMES = ('GC ViT-T', 'DAT-T', 'DAT-T++', 'QuadTree-B2')
SIDES = {
    'cpu': (224, 320, 448, 640, 896),
    'cuda': (224, 320, 448, 640, 896, 1280, 1792, 2048),
}
HEADER = (
    '| backbone | side | forward ms | step ms | memory MiB | step, microseconds a pixel |\n|---|'
    + '---|' * 5
)


def add_options(parser) -> None:
    parser.add_argument('--sides', type=int, nargs='+', help=f'of the images {SIDES}')


def run(args, machine, about: str):
    """Measures the chosen backbones: rows for the JSON file, a chart, and the last sentence."""
    sides = args.sides or SIDES[args.device]
    chosen = choose({name: name for name in NAMES}, args.only)
    print(HEADER, flush=True)
    rows, time, memory = [], {}, {}
    for name in chosen:
        for side in sides:
            row = Row(name, COMPILED, batch=1)
            torch.manual_seed(0)
            image = torch.randn(1, 3, side, side, device=args.device)
            measure(row, build(name, DETECTION), image, args.dtype)
            gc.collect()
            if row.step is None:
                print(f'| {name} | {side} | out of memory |', flush=True)
                break
            cells = [
                figure(v) for v in (row.forward, row.step, row.memory, row.step / side**2 * 1e3)
            ]
            print(f'| {name} | {side} | {" | ".join(cells)} |', flush=True)
            rows.append(dict(asdict(row), side=side))
            for curves, value in ((time, row.step / 1e3), (memory, row.memory * 2**20)):
                pixels, values = curves.setdefault(name, ([], []))
                pixels.append(side**2)
                values.append(value)
    return rows, plot_growth(time, memory, about), f'{len(rows)} measured'
