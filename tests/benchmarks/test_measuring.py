"""Times are medians of enough calls; memory is the peak above what was in use."""

import sys

import pytest
import torch

from benchmarks import measuring


def test_seconds_is_the_median_of_at_least_three_calls(monkeypatch):
    monkeypatch.setattr(measuring, 'SECONDS', 0)
    times = iter([5.0, 7.0])
    monkeypatch.setattr(measuring, 'seconds_once', lambda function: next(times))
    assert measuring.seconds(lambda: None) == 5.0  # the first of the three took no time


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is read from /proc')
def test_peak_memory_is_that_of_the_call():
    held = torch.ones(2**24)  # 64 MiB in use before the call do not count

    def call():
        torch.ones(2**25)  # 128 MiB, freed
        torch.ones(2**24)

    assert measuring.peak_memory(call, 'cpu') == pytest.approx(128, rel=0.1)
    assert held.sum() == 2**24


def test_choose_takes_patterns():
    cases = {'a, 224': 1, 'a, det': 2, 'b, det': 3}
    assert measuring.choose(cases, ['a*', '*det']) == cases
    assert measuring.choose(cases, ['a, *']) == {'a, 224': 1, 'a, det': 2}
