"""The benchmark of training: its configs, its tables, its failures."""

import argparse
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from benchmarks import training


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path('work_dirs/benchmark').mkdir(parents=True)


def rows(printed):
    lines = [line for line in printed.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_recomputation_is_compared_with_storing(monkeypatch, capsys):
    built = []

    def build(with_cp):
        built.append(with_cp)
        return torch.nn.Conv2d(3, 1, 1)

    memory = {False: 200.0, True: 50.0}
    monkeypatch.setattr(training, 'BACKBONES', {'small': build})
    monkeypatch.setattr(training, 'peak_memory', lambda step, device: memory[built[-1]])
    monkeypatch.setattr(training, 'seconds_once', lambda step: 1.0 + built[-1])
    training.checkpointing(argparse.Namespace(size='24x16', batch=2, device='cpu', steps=1))
    (row,) = rows(capsys.readouterr().out)
    assert row == ['small', '1.00', '2.00', '2.00', '200', '50', '0.25']


def test_processes_are_timed_after_the_first_steps(monkeypatch, capsys):
    started = []

    def train(config, data, processes, threads):
        started.append((Config.fromfile(config), data, processes, threads))
        return [2.0, 1.0, 4.0], 100.0

    monkeypatch.setattr(training, 'train', train)
    for layout in ('coco', 'imagenet'):
        Path('work_dirs/benchmark', layout).mkdir()
    training.processes(argparse.Namespace(only=None, steps=3))
    table = rows(capsys.readouterr().out)
    assert [row[:3] for row in table] == [
        [job, *setting]
        for job in ('detector', 'classifier')
        for setting in (['1', '1'], ['1', '2'], ['2', '1'])
    ]
    assert [row[3:] for row in table[2::3]] == [['2.00', '1.00', '100'], ['2.00', '8.00', '100']]
    cfg, data, *_ = started[0]
    assert cfg.train_cfg.max_iters == 3 + training.WARMUP
    assert cfg.model.backbone.arch == 'xxtiny'
    assert Path(data['MMATTN_COCO']) == Path('work_dirs/benchmark/coco').resolve()


def test_a_failed_run_names_its_log(monkeypatch):
    config = Path('broken.py')
    config.write_text('model = dict()')
    fake = Path('tools')
    fake.mkdir()
    (fake / 'dist_train.sh').write_text('#!/bin/sh\necho broken; exit 3\n')
    (fake / 'dist_train.sh').chmod(0o755)
    monkeypatch.setattr(training, 'TOOLS', fake.resolve())
    with pytest.raises(SystemExit, match=r'broken_2x1\.log'):
        training.train(config, {}, 2, 1)
    assert Path('work_dirs/benchmark/broken_2x1.log').read_text() == 'broken\n'
