"""Backbones on one square image of growing side: time and memory over the number of pixels."""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict

import torch

from .backbones import COMPILED, DETECTION, Row, build, measure
from .charts import Curve, plot_growth
from .measuring import MIB, Machine, Table, choose, figure

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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--sides', type=int, nargs='+', help=f'of the images {SIDES}')


def run(args: argparse.Namespace, machine: Machine, about: str) -> Table:
    """Measure the chosen backbones."""
    sides = args.sides or SIDES[args.device]
    chosen = choose({name: name for name in NAMES}, args.only)
    print(HEADER, flush=True)
    rows: list[dict] = []
    time: dict[str, Curve] = {}
    memory: dict[str, Curve] = {}
    for name in chosen:
        for side in sides:
            row = Row(name, COMPILED, batch=1)
            torch.manual_seed(0)
            image = torch.randn(1, 3, side, side, device=args.device)
            measure(row, build(name, DETECTION), image, args.dtype)
            gc.collect()
            if row.forward is None or row.step is None or row.memory is None:
                print(f'| {name} | {side} | out of memory |', flush=True)
                break
            cells = [
                figure(v) for v in (row.forward, row.step, row.memory, row.step / side**2 * 1e3)
            ]
            print(f'| {name} | {side} | {" | ".join(cells)} |', flush=True)
            rows.append(dict(asdict(row), side=side))
        measured = [row for row in rows if row['name'] == name]
        if measured:
            pixels = [row['side'] ** 2 for row in measured]
            time[name] = pixels, [row['step'] / 1e3 for row in measured]
            memory[name] = pixels, [row['memory'] * MIB for row in measured]
    return Table(rows, plot_growth(time, memory, about), f'{len(rows)} measured')
