"""Time mmattn's operators, backbones and detectors, with peak memory, beside others.

    python tools/analysis_tools/benchmark.py COMMAND [options]

`ops`, `backbones`, `detectors` and `scaling` print a table and leave it as COMMAND_DEVICE.json
with a chart, COMMAND_DEVICE.png, in work_dirs/benchmark. Times are medians; a step is forward and
backward. `COMMAND --help` says more.

The floor of an operator is the time that the machine's best matrix product and copy, measured
first, would take for its multiply-adds and for reading its inputs and writing its outputs once; in
a step, for 3.5 times the products and twice the bytes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from mmattn.ops import backend_report

from . import backbones, detectors, ops, quadtree_scaling, scaling, soak, training
from .measuring import about_machine, hardware

# Each has HELP, DTYPE, add_options(parser) and run(args, machine, about) -> Table.
TABLES = {'ops': ops, 'backbones': backbones, 'detectors': detectors, 'scaling': scaling}
# Each has HELP and add_options(parser), which sets `run`.
OTHERS = {'training': training, 'soak': soak, 'quadtree_scaling': quadtree_scaling}


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in {**TABLES, **OTHERS}.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=raw
        )
        if name in TABLES:
            add_table_options(command, name, module)
        module.add_options(command)
    return parser.parse_args()


def add_table_options(parser: argparse.ArgumentParser, name: str, module: ModuleType) -> None:
    """Add the options that the commands with a table share."""
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='[cpu]')
    parser.add_argument(
        '--dtype',
        choices=('float32', 'float16', 'bfloat16'),
        help=f'of autocast, or of the operators [{module.DTYPE["cpu"]}; '
        f'on a GPU {module.DTYPE["cuda"]}]',
    )
    parser.add_argument(
        '--only', nargs='+', default=['*'], metavar='PATTERN', help='names, as in file names'
    )
    parser.add_argument('--threads', type=int, help="of the CPU [torch's]")
    parser.add_argument(
        '--json', type=Path, help=f'the output [work_dirs/benchmark/{name}_DEVICE.json]'
    )
    parser.set_defaults(run=partial(write_table, module))


def write_table(module: ModuleType, args: argparse.Namespace) -> None:
    """Measure, print a table, and write its figures and its chart."""
    args.dtype = args.dtype or module.DTYPE[args.device]
    path = args.json or Path(f'work_dirs/benchmark/{args.command}_{args.device}.json')
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = hardware(args.device, getattr(torch, args.dtype))
    about = about_machine(args.device, args.dtype, machine)
    print(f'{about}\n{backend_report()}', flush=True)
    table = module.run(args, machine, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=about, rows=table.rows), indent=1))
    table.chart.savefig(path.with_suffix('.png'))
    print(f'\n{table.summary}; {path}, {path.with_suffix(".png")}')


def main() -> None:
    args = parse_args()
    args.run(args)
