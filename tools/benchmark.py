"""Times mmattn's operators, backbones and detectors, with peak memory, beside others.

    python tools/benchmark.py ops        each operator, its literal definition and the hardware's floor
    python tools/benchmark.py backbones  whole backbones, with literal operators and with compiled ones
    python tools/benchmark.py detectors  Mask R-CNN's training step and inference, beside mmdet's Swin-T and R50
    python tools/benchmark.py scaling    backbones on images of growing size

Each prints a table and leaves it as COMMAND_DEVICE.json with a chart, COMMAND_DEVICE.png, in
work_dirs/benchmark. Times are medians; a step is forward and backward. `COMMAND --help` says more.

The floor of an operator is the time that the machine's own best matrix product and copy, measured
first, would take for its multiply-adds and for reading its inputs and writing its outputs once; in a
step, for 3.5 times the products and twice the bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _benchmark_backbones
import _benchmark_detectors
import _benchmark_ops
import _benchmark_scaling
import torch
from _measuring import about_machine, hardware

from mmattn.ops import backend_report

COMMANDS = {
    'ops': _benchmark_ops,
    'backbones': _benchmark_backbones,
    'detectors': _benchmark_detectors,
    'scaling': _benchmark_scaling,
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='[cpu]')
        command.add_argument(
            '--dtype',
            choices=('float32', 'float16', 'bfloat16'),
            help=f'of autocast, or of the operators [{module.DTYPE["cpu"]}; '
            f'on a GPU {module.DTYPE["cuda"]}]',
        )
        command.add_argument(
            '--only', nargs='+', default=['*'], metavar='PATTERN', help='names, as in file names'
        )
        command.add_argument('--threads', type=int, help="of the CPU [torch's]")
        command.add_argument(
            '--json',
            type=Path,
            help=f'where the figures go [work_dirs/benchmark/{name}_DEVICE.json]',
        )
        module.add_options(command)
    args = parser.parse_args()
    args.dtype = args.dtype or COMMANDS[args.command].DTYPE[args.device]
    args.json = args.json or Path(f'work_dirs/benchmark/{args.command}_{args.device}.json')
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = hardware(args.device, getattr(torch, args.dtype))
    about = about_machine(args.device, args.dtype, machine)
    print(f'{about}\n{backend_report()}', flush=True)
    rows, chart, summary = COMMANDS[args.command].run(args, machine, about)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(dict(machine=about, rows=rows), indent=1))
    picture = args.json.with_suffix('.png')
    chart.savefig(picture)
    print(f'\n{summary}; {args.json}, {picture}')


if __name__ == '__main__':
    main()
