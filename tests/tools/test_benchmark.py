"""tools/benchmark.py from end to end, on its smallest case."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / 'tools/benchmark.py'


@pytest.fixture
def run(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), 'ops', *map(str, arguments)])
        tool = runpy.run_path(str(TOOL))
        tool['main'].__globals__['SECONDS'] = 0.01
        tool['main']()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def test_table_figures_and_chart(run, tmp_path, capsys):
    target = tmp_path / 'figures.json'
    run('--only', 'window_attention: GC ViT-T 224, stage 4*', '--json', target, '--threads', 1)
    printed = capsys.readouterr().out
    assert 'cpu: compiled operators' in printed and '1 threads, float32' in printed
    assert '| window_attention: GC ViT-T 224, stage 4, window 7 |' in printed
    figures = json.loads(target.read_text())
    (row,) = figures['rows']
    assert 0 < row['floor_forward'] < row['compiled_forward'] < row['compiled_step']
    assert row['floor_forward'] < row['floor_step'] < row['literal_step']
    assert target.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


def test_unknown_case_lists_what_there_is(run):
    with pytest.raises(
        SystemExit, match=r'(?s)no case matches .nothing.*deform_attention: DAT-T det'
    ):
        run('--only', 'nothing')
