"""tools/benchmark_training.py on sizes that cost nothing."""

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config

from mmattn.backbones import GCViT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(load_tool, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.chdir(tmp_path)
    Path('work_dirs/benchmark').mkdir(parents=True)
    return load_tool('benchmark_training')


def rows(printed):
    lines = [line for line in printed.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_recomputation_takes_less_memory(tool, monkeypatch, capsys):
    arch = dict(embed_dims=32, depths=(8, 1, 1, 1), num_heads=(2, 2, 4, 8), mlp_ratio=4)
    monkeypatch.setattr(tool, 'BACKBONES', {'small': lambda cp: GCViT(arch, with_cp=cp)})
    tool.checkpointing(argparse.Namespace(size='224x192', batch=2, device='cpu', steps=1))
    ((name, _, _, _, stored, recomputed, ratio),) = rows(capsys.readouterr().out)
    assert name == 'small'
    assert float(recomputed) < 0.8 * float(stored)
    assert float(ratio) == pytest.approx(float(recomputed) / float(stored), abs=0.02)


def test_processes_are_timed_after_the_first_steps(tool, monkeypatch, capsys):
    started = []

    def train(config, data, processes, threads):
        started.append((Config.fromfile(config), data, processes, threads))
        return [2.0, 1.0, 4.0], 100.0

    monkeypatch.setattr(tool, 'train', train)
    for layout in ('coco', 'imagenet'):
        Path('work_dirs/benchmark', layout).mkdir()
    tool.processes(argparse.Namespace(only=None, steps=3))
    table = rows(capsys.readouterr().out)
    assert [row[:3] for row in table] == [
        [job, *setting]
        for job in ('detector', 'classifier')
        for setting in (['1', '1'], ['1', '2'], ['2', '1'])
    ]
    assert [row[3:] for row in table[2::3]] == [['2.00', '1.00', '100'], ['2.00', '8.00', '100']]
    cfg, data, *_ = started[0]
    assert cfg.train_cfg.max_iters == 3 + tool.WARMUP
    assert cfg.model.backbone.arch == 'xxtiny'
    assert Path(data['MMATTN_COCO']) == Path('work_dirs/benchmark/coco').resolve()


def test_a_failed_run_names_its_log(tool, monkeypatch):
    config = Path('broken.py')
    config.write_text('model = dict()')
    fake = Path('tools')
    fake.mkdir()
    (fake / 'dist_train.sh').write_text('#!/bin/sh\necho broken; exit 3\n')
    (fake / 'dist_train.sh').chmod(0o755)
    monkeypatch.setattr(tool, 'TOOLS', fake.resolve())
    with pytest.raises(SystemExit, match=r'broken_2x1\.log'):
        tool.train(config, {}, 2, 1)
    assert Path('work_dirs/benchmark/broken_2x1.log').read_text() == 'broken\n'
