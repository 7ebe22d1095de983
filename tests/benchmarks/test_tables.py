"""benchmark.py end to end: each command that prints a table, on its smallest case."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmattn.backbones
from benchmarks import backbones, command, measuring
from benchmarks.measuring import Machine, figure

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/benchmark.py'
RATES = Machine(products=1e9, bandwidth=1e8)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command with smaller tables of cases; return the rows of its JSON file."""

    def call(name, *arguments, **smaller):
        monkeypatch.setattr(measuring, 'SECONDS', 0.01)
        monkeypatch.setattr(command, 'hardware', lambda device, dtype: RATES)
        for key, value in smaller.items():
            monkeypatch.setattr(command.TABLES[name], key, value)
        target = tmp_path / 'figures.json'
        options = ['--json', target, '--threads', 1, *arguments]
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', name, *map(str, options)])
        runpy.run_path(str(TOOL), run_name='__main__')
        assert target.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
        figures = json.loads(target.read_text())
        assert '1 threads, float32' in figures['machine']
        return figures['rows']

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def cells(printed, *first):
    """Remaining cells of the printed row that begins with these cells."""
    start = f'| {" | ".join(first)} | '
    (line,) = (line for line in printed.splitlines() if line.startswith(start))
    return line.removeprefix(start).removesuffix(' |').split(' | ')


def test_ops(run, capsys):
    name = 'window_attention: GC ViT-T 224, stage 4, window 7'
    (row,) = run('ops', '--only', name)
    printed = capsys.readouterr().out
    assert 'cpu: compiled operators' in printed
    # Batch 4, one window of 7 x 7 tokens, 16 heads of 32 channels.
    tokens, heads, d = 49, 16, 32
    products = 4 * heads * 2 * tokens**2 * d
    numbers = 4 * 4 * tokens * heads * d + heads * tokens**2 + 2 * heads * d
    floor = max(products / RATES.products, 4 * numbers / RATES.bandwidth) * 1e3
    assert row['floor_forward'] == pytest.approx(floor)
    floor = max(3.5 * products / RATES.products, 8 * numbers / RATES.bandwidth) * 1e3
    assert row['floor_step'] == pytest.approx(floor)
    ratio, floor = cells(printed, name)[2:4]
    assert ratio == f'{row["reference_forward"] / row["compiled_forward"]:.1f}x'
    assert floor == figure(row['floor_forward'])


@pytest.mark.parametrize('name', ['ops', 'backbones', 'detectors', 'scaling'])
def test_unknown_case_lists_what_there_is(run, name):
    with pytest.raises(SystemExit, match=r'(?s)no case matches .nothing.*DAT-T'):
        run(name, '--only', 'nothing')


def test_backbones(run, capsys):
    shapes = {'cpu': {'224': (2, 3, 64, 64), 'det': (1, 3, 64, 96)}}
    rows = run('backbones', '--only', 'QuadTree-B2*', SHAPES=shapes)
    assert [(row['name'], row['operators']) for row in rows] == [
        (f'QuadTree-B2, {kind}', operators)
        for kind in ('224', 'det')
        for operators in ('reference', 'compiled')
    ]
    printed = capsys.readouterr().out
    for row, kind in zip(rows[1::2], ('224', 'det'), strict=True):
        counter = FlopCounterMode(display=False, custom_mapping=backbones.FUSED_ON_CPU)
        with counter, torch.no_grad():
            backbones.build('QuadTree-B2', kind).eval()(torch.randn(shapes['cpu'][kind]))
        flops = 3 * counter.get_total_flops()
        assert row['tflops'] * row['step'] * 1e9 == pytest.approx(flops)
        images = figure(shapes['cpu'][kind][0] / row['forward'] * 1e3)
        assert cells(printed, row['name'], 'compiled')[1] == images
    ratio = f'{rows[1]["step"] / rows[0]["step"]:.2f}'
    assert cells(printed, 'QuadTree-B2, 224', 'compiled')[-1] == ratio


def test_out_of_memory_has_its_row(run, monkeypatch, capsys):
    def forward(self, x):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(mmattn.backbones.DAT, 'forward', forward)
    rows = run('backbones', '--only', 'DAT-T, det')
    assert [row['memory'] for row in rows] == [None, None]
    assert 'DAT-T, det | compiled | - | - | - | - | out of memory | - |' in capsys.readouterr().out


def test_peers_need_timm_and_say_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(SystemExit, match=r'--peers needs timm .*pip install timm'):
        run('backbones', '--peers', '--only', 'Swin-T, 224')


def test_scaling(run, capsys):
    rows = run('scaling', '--only', 'DAT-T', '--sides', 64, 96)
    assert [(row['name'], row['side']) for row in rows] == [('DAT-T', 64), ('DAT-T', 96)]
    printed = capsys.readouterr().out
    for row in rows:
        a_pixel = figure(row['step'] * 1e3 / row['side'] ** 2)
        assert cells(printed, 'DAT-T', str(row['side']))[-1] == a_pixel


def test_detectors(run, capsys):
    (row,) = run('detectors', '--only', '*R50*', SCALES={'cpu': (96, 96)}, IMAGES=2)
    printed = capsys.readouterr().out
    assert '2 images of the generator, within 96 x 96' in printed
    step, rate, *_ = cells(printed, 'Mask R-CNN R50 (mmdet)')
    assert (step, rate) == (figure(row['step']), figure(1e3 / row['step']))
