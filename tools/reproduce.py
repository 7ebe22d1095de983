"""Test the models of a paper's table, and compare the figures with the published ones.

    python tools/reproduce.py --list
    python tools/reproduce.py TABLE [ROW ...] [--out DIR]
    python tools/reproduce.py TABLE [ROW ...] --train

Data sets are found as by tools/test.py. Rows that were tested are kept: after an interruption the
same command goes on. TABLE.md, TABLE.json and TABLE.png hold all rows tested so far.
"""

import argparse
import collections
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmattn.engine.reproduction import (
    Row,
    Table,
    compare,
    fingerprint,
    measured_figures,
    read_tables,
    to_json,
    to_markdown,
)
from mmattn.engine.runtime import stop
from mmattn.visualization.draw.comparison import plot_comparison

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(r'Epoch\(test\)\s+\[\s*(\d+/\d+)\]\s+eta: (.+?)  ')
DOWNLOAD = re.compile(r'\d+(?:\.\d+)?\s*%')
SENTENCE = re.compile(r'^test\.py: (.+)', re.MULTILINE)  # by which the tool stops
PATIENCE = 5.0  # seconds between two lines of progress

Outcome = dict[str, Any]  # of a test: what, and its figures as text or the reason of its failure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('table', nargs='?', help='name of a table')
    parser.add_argument('rows', nargs='*', metavar='row', help='names of its rows [all]')
    parser.add_argument('--list', action='store_true', help='list the tables and their rows')
    parser.add_argument('--train', action='store_true', help='print how to train each row')
    parser.add_argument('--out', type=Path, metavar='DIR', help='[work_dirs/reproduce/TABLE]')
    parser.add_argument(
        '--checkpoint',
        type=row_and_file,
        nargs='+',
        default=[],
        metavar='ROW=FILE',
        help='test your own weights in these rows',
    )
    parser.add_argument(
        '--gpus', type=int, metavar='N', help='for each test [1] or training [the recipe, up to 8]'
    )
    parser.add_argument('--fresh', action='store_true', help='test again what was tested before')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help="override rows' configs"
    )
    parser.add_argument(
        '--tables',
        type=Path,
        default=ROOT / 'configs/tables.yml',
        metavar='FILE',
        help='another file of tables, for your own models [configs/tables.yml]',
    )
    args = parser.parse_args()
    if args.table is None and not args.list:
        parser.error('name a table; --list shows them')
    if args.gpus is not None and args.gpus < 1:
        parser.error(f'argument --gpus must be at least 1, got {args.gpus}')
    return args


def row_and_file(text: str) -> tuple[str, str]:
    row, _, file = text.partition('=')
    if not row or not file:
        raise argparse.ArgumentTypeError(f'must be ROW=FILE, got {text}')
    return row, file


def main() -> None:
    args = parse_args()
    # Below, mmengine tells which environment variables each config reads.
    MMLogger.get_current_instance().setLevel('WARNING')
    try:
        tables = read_tables(args.tables)
    except (OSError, ValueError, yaml.YAMLError) as error:
        stop(str(error))
    if args.table is not None and args.table not in tables:
        stop(f'TABLE must be one of {", ".join(tables)}, got {args.table}')
    if args.list:
        for name in [args.table] if args.table else tables:
            list_rows(name, tables[name])
        return
    table = tables[args.table]
    for name in [*args.rows, *dict(args.checkpoint)]:
        if name not in table.rows:
            stop(f'ROW must be one of {", ".join(table.rows)}, got {name}')
    rows = {name: row for name, row in table.rows.items() if name in args.rows or not args.rows}
    if args.train:
        print_trainings(args.table, rows, args.gpus)
    else:
        reproduce(args, table, rows)


def list_rows(name: str, table: Table) -> None:
    print(f'{name}  ({table.title})')
    for row_name, row in table.rows.items():
        figures = ', '.join(f'{metric} {value}' for metric, value in row.published.items())
        print(
            f'  {row_name}: {figures or "no published figure"}; '
            f'{row.checkpoint or "no published weights: train it first"}'
        )


def relative(path: Path) -> str:
    return os.path.relpath(path)


# -------------------------------------------------------------------------------------- training


def print_trainings(table: str, rows: Mapping[str, Row], gpus: int | None) -> None:
    """Print the command lines that train each config of the rows, and test the last checkpoint."""
    for config in dict.fromkeys(row.config for row in rows.values()):
        cfg = Config.fromfile(config)
        each, step = cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size
        number = gpus or min(8, step // each)
        images = number * each
        if number > 1:
            command = [relative(ROOT / 'tools/dist_train.sh'), relative(config), str(number)]
        else:
            command = ['python', relative(ROOT / 'tools/train.py'), relative(config)]
        note = f'{step} images a step'
        if images != step:
            command.append('--auto-scale-lr')
            note += f' by the recipe, and {images} here, with the learning rate scaled'
        print(f'# {config.stem}: {note}\n{shlex.join(command)}')
        epochs = cfg.train_cfg.get('max_epochs')
        last = f'epoch_{epochs}.pth' if epochs else f'iter_{cfg.train_cfg.max_iters}.pth'
        names = [name for name, row in rows.items() if row.config == config]
        own = [f'{name}=work_dirs/{config.stem}/{last}' for name in names]
        tool = ['python', relative(ROOT / 'tools/reproduce.py')]
        print(shlex.join([*tool, table, *names, '--checkpoint', *own]))


# --------------------------------------------------------------------------------------- testing


def reproduce(args: argparse.Namespace, table: Table, rows: Mapping[str, Row]) -> None:
    """Test the rows that were not tested yet, and write the table."""
    # A scheduler's signal ends a test as ^C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = args.out or Path('work_dirs/reproduce', args.table)
    own = dict(args.checkpoint)
    todo = {name: own.get(name, row.checkpoint) for name, row in rows.items()}
    for name in args.rows:
        if todo[name] is None:
            stop(f'{name} has no published weights: train it (--train) and give --checkpoint')
    todo = {name: checkpoint for name, checkpoint in todo.items() if checkpoint}
    failed = []
    try:
        for i, (name, checkpoint) in enumerate(todo.items(), start=1):
            print(f'[{i}/{len(todo)}] {name}: {checkpoint}', flush=True)
            outcome = test(rows[name], checkpoint, out / name, args)
            print(f'  {summary(outcome)}', flush=True)
            if 'reason' in outcome:
                failed.append(name)
    except KeyboardInterrupt:
        write(args.table, table, out)
        print(f'interrupted in {name}: the same command goes on there', file=sys.stderr)
        raise SystemExit(130) from None
    print(f'\n{write(args.table, table, out)}')
    print(f'written: {relative(out)}/{args.table}.md, .json and, with anything measured, .png')
    if failed:
        stop(f'{len(failed)} of {len(todo)} rows failed: {", ".join(failed)}')


def test(row: Row, checkpoint: str, folder: Path, args: argparse.Namespace) -> Outcome:
    """The kept outcome of this test, or else a new one."""
    what = dict(checkpoint=checkpoint, fingerprint=fingerprint(row, checkpoint, args.cfg_options))
    kept = folder / 'outcome.json'
    if kept.is_file() and not args.fresh:
        outcome = json.loads(kept.read_text())
        if 'reason' not in outcome and {**outcome, **what} == outcome:
            print('  tested before')
            return outcome
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.time()
    tested = run_test(row, checkpoint, folder, args)
    outcome = what | tested | dict(seconds=round(time.time() - start))
    outcome['finished'] = time.strftime('%Y-%m-%d %H:%M:%S')
    replace(kept, json.dumps(outcome, indent=2))
    return outcome


def run_test(row: Row, checkpoint: str, folder: Path, args: argparse.Namespace) -> Outcome:
    """Run tools/test.py in a process of its own; return ``measured`` figures or a ``reason``."""
    tool = [sys.executable, str(ROOT / 'tools/test.py'), str(row.config), checkpoint]
    if (args.gpus or 1) > 1:
        script = str(ROOT / 'tools/dist_test.sh')
        tool = ['bash', script, str(row.config), checkpoint, str(args.gpus)]
    options = [*(f'{key}={value}' for key, value in row.options.items()), *args.cfg_options]
    command = [*tool, '--work-dir', str(folder / 'test'), *['--tta'] * row.multi_scale]
    command += ['--cfg-options', *options] if options else []
    last: collections.deque[str] = collections.deque(maxlen=200)
    with (
        (folder / 'test.log').open('w') as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            env={**os.environ, 'PYTHON': sys.executable},
        ) as process,
    ):
        try:
            shown = 0.0
            for line in process.stdout or ():
                log.write(line)
                last.append(line)
                if (text := progress(line)) and time.monotonic() - shown > PATIENCE:
                    print(f'  {text}', flush=True)
                    shown = time.monotonic()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        return dict(reason=why(last))
    try:
        (report,) = folder.glob('test/*/*.json')
        figures = measured_figures(row, json.loads(report.read_text()))
    except ValueError as error:
        return dict(reason=str(error))
    return dict(measured={metric: str(value) for metric, value in figures.items()})


def progress(line: str) -> str | None:
    """A short form of a line that tells how far a test or a download is."""
    if match := PROGRESS.search(line):
        return f'{match[1]}, {match[2]} to go'
    return line.strip() if DOWNLOAD.search(line) else None


def why(lines: Iterable[str]) -> str:
    """The sentence by which a tool stopped, or its last line."""
    text = ''.join(lines).strip()
    if match := SENTENCE.search(text):
        return match[1]
    return text.splitlines()[-1] if text else 'the test ended without a word'


def summary(outcome: Outcome) -> str:
    if 'reason' in outcome:
        return f'failed: {outcome["reason"]}'
    figures = ', '.join(f'{metric} {value}' for metric, value in outcome['measured'].items())
    return f'{figures} ({outcome["seconds"]} s)'


# --------------------------------------------------------------------------------------- writing


def write(name: str, table: Table, out: Path) -> str:
    """Write the table with all outcomes so far as Markdown, JSON and a chart; return the first."""
    outcomes = {
        row: json.loads((out / row / 'outcome.json').read_text())
        for row in table.rows
        if (out / row / 'outcome.json').is_file()
    }
    out.mkdir(parents=True, exist_ok=True)
    text = to_markdown(table, outcomes)
    replace(out / f'{name}.md', text)
    replace(out / f'{name}.json', to_json(table, outcomes))
    lines = [line for line in compare(table, outcomes) if line['measured']]
    if lines:
        plot_comparison(table.title, lines).savefig(out / f'{name}.png')
    return text


def replace(path: Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    temporary = path.with_name(f'.{path.name}')
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == '__main__':
    main()
