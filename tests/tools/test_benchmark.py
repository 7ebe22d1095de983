"""tools/benchmark.py from end to end, each command on its smallest case."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command with some of its tables made smaller; returns the rows that it left."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def call(command, *arguments, **smaller):
        import _measuring

        monkeypatch.setattr(_measuring, 'SECONDS', 0.01)
        module = __import__(f'_benchmark_{command}')
        for name, value in smaller.items():
            monkeypatch.setattr(module, name, value)
        target = tmp_path / 'figures.json'
        options = ['--json', target, '--threads', 1, *arguments]
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', command, *map(str, options)])
        runpy.run_path(str(TOOLS / 'benchmark.py'), run_name='__main__')
        assert target.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
        figures = json.loads(target.read_text())
        assert '1 threads, float32' in figures['machine']
        return figures['rows']

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def test_ops(run, capsys):
    (row,) = run('ops', '--only', 'window_attention: GC ViT-T 224, stage 4*')
    printed = capsys.readouterr().out
    assert 'cpu: compiled operators' in printed
    assert '| window_attention: GC ViT-T 224, stage 4, window 7 |' in printed
    assert 0 < row['floor_forward'] < row['compiled_forward'] < row['compiled_step']
    assert row['floor_forward'] < row['floor_step'] < row['literal_step']


@pytest.mark.parametrize('command', ['ops', 'backbones', 'detectors', 'scaling'])
def test_unknown_case_lists_what_there_is(run, command):
    with pytest.raises(SystemExit, match=r'(?s)no case matches .nothing.*DAT-T'):
        run(command, '--only', 'nothing')


def test_backbones(run, capsys):
    shapes = {'cpu': {'224': (2, 3, 64, 64), 'det': (1, 3, 64, 96)}}
    rows = run('backbones', '--only', 'QuadTree-B2*', SHAPES=shapes)
    assert [(row['name'], row['operators']) for row in rows] == [
        (f'QuadTree-B2, {kind}', operators)
        for kind in ('224', 'det')
        for operators in ('literal', 'compiled')
    ]
    for row in rows:
        assert 0 < row['forward'] < row['step'] and row['memory'] > 0 and row['tflops'] > 0
    # The same model: the counted operations differ by the literal operators' own, which are a few per cent.
    operations = [row['tflops'] * row['step'] for row in rows[:2]]
    assert operations[0] == pytest.approx(operations[1], rel=0.1)
    ratio = f'{rows[1]["step"] / rows[0]["step"]:.2f}'
    (line,) = (x for x in capsys.readouterr().out.splitlines() if '224 | compiled' in x)
    assert line.endswith(f'| {ratio} |')


def test_a_backbone_that_does_not_fit_is_said_so(run, monkeypatch, capsys):
    import mmattn.backbones

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


def test_scaling(run):
    rows = run('scaling', '--only', 'DAT-T', '--sides', 64, 96)
    assert [(row['name'], row['side']) for row in rows] == [('DAT-T', 64), ('DAT-T', 96)]
    assert all(0 < row['forward'] < row['step'] for row in rows)


def test_detectors(run, capsys):
    (row,) = run('detectors', '--only', '*R50*', SCALES={'cpu': (96, 96)}, IMAGES=2)
    assert row['batch'] == 1 and row['inference'] > 0 and row['step'] > 0 and row['memory'] > 0
    assert '2 images of the generator, within 96 x 96' in capsys.readouterr().out
