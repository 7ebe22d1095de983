"""Memory measure and verdict of the soak benchmark.

tests/tools/test_reliability.py checks the backbones' memory over a few sizes.
"""

import mmap

import numpy as np
import pytest

from benchmarks import soak

MIB = 2**20


def record(allocated, resident):
    return dict(allocated=allocated, resident=resident, size=[(64, 64 + i % 7) for i in range(200)])


def noise(level):
    return list(500 * MIB + level * MIB * np.random.default_rng(0).standard_normal(200))


@pytest.mark.parametrize('name', ['allocated', 'resident'])
def test_a_grid_kept_for_each_size_is_found(name, capsys):
    """A leak is found among noise; growth during warm-up does not count."""
    start = [value / 2 for value in noise(3)[:50]]
    steady = start + noise(3)[50:]
    assert soak.report('gcvit', record(steady, steady), 50)
    assert 'gcvit: 7 sizes' in capsys.readouterr().out
    grid, layers = 56 * 56 * 2 * 4, 5
    growing = [value + i * layers * grid for i, value in enumerate(steady)]
    records = dict(allocated=steady, resident=steady) | {name: growing}
    assert not soak.report('gcvit', record(**records), 50)
    assert 'GROWS' in capsys.readouterr().out


def test_both_measures_see_what_is_held():
    before = soak.allocated()
    held = np.empty(64 * MIB, np.uint8)
    assert soak.allocated() - before == pytest.approx(held.nbytes, rel=0.1)
    before = soak.resident()
    pages = mmap.mmap(-1, 64 * MIB)  # malloc may reuse freed memory, which is resident
    pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)
    assert soak.resident() - before == pytest.approx(len(pages), rel=0.1)
