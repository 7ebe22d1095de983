"""The chart of QuadTree attention's cost: full attention, curves, errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from benchmarks import command, quadtree_scaling

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/benchmark.py'


def test_both_full_attentions_are_the_same():
    fused, matrix = (
        quadtree_scaling.build(quadtree_scaling.FUSED),
        quadtree_scaling.build(quadtree_scaling.MATRIX),
    )
    matrix.load_state_dict(fused.state_dict())
    x = torch.randn(1, 8, 12, quadtree_scaling.DIM)
    torch.testing.assert_close(fused(x), matrix(x))


def test_quadtree_is_that_of_the_first_stage():
    from mmattn.backbones import QuadTree

    with torch.device('meta'):
        attention = QuadTree('b1').stages[0].blocks[0].attn
        built = quadtree_scaling.build('QuadTree, K = 32')
    assert {name: x.shape for name, x in attention.state_dict().items()} == {
        name: x.shape for name, x in built.state_dict().items()
    }
    for name in ('num_heads', 'num_levels', 'topks', 'attn_type'):
        assert getattr(attention, name) == getattr(built, name)


def test_error_falls_with_k_and_with_sharp_scores():
    curves = quadtree_scaling.measure_error(deviations=(1, 4), topks=(1, 8, 64), draws=1)
    (_, flat), (_, sharp) = curves.values()
    for errors in (flat, sharp):
        assert errors == sorted(errors, reverse=True)
    assert all(a > b for a, b in zip(flat, sharp, strict=True))


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is read from /proc')
def test_measures_every_curve_and_draws_it(tmp_path):
    command = [sys.executable, TOOL, 'quadtree_scaling', '--out', tmp_path / 'scaling.png']
    subprocess.run([*command, '--sides', '16'], check=True)
    found = json.loads((tmp_path / 'scaling.json').read_text())
    assert found['torch'] == torch.__version__
    assert list(found['curves']) == [
        'QuadTree, K = 8',
        'QuadTree, K = 32',
        'full, fused',
        'full, the matrix stored',
    ]
    for curve in found['curves'].values():
        assert curve['tokens'] == [256]
        assert len(curve['seconds']) == len(curve['bytes']) == 1
    picture = imread(tmp_path / 'scaling.png')
    assert picture.shape[:2] == (450, 1170) and picture[..., :3].std() > 0.05

    (tmp_path / 'scaling.png').unlink()
    subprocess.run([*command, '--draw-only'], check=True)
    assert np.array_equal(imread(tmp_path / 'scaling.png'), picture)


def test_sides_must_divide(monkeypatch):
    argv = ['benchmark.py', 'quadtree_scaling', '--sides', '32', '100']
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit, match=r'--sides must be multiples of 8, got \[32, 100\]'):
        command.main()
