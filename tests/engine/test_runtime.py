"""Configs on machines without an NVIDIA GPU."""

import pytest
from mmengine.config import Config

from mmattn.engine import runtime


@pytest.mark.parametrize('device, expected', [('cpu', 'OptimWrapper'), ('mps', 'OptimWrapper'),
                                              ('cuda', 'AmpOptimWrapper')])  # fmt: skip
def test_mixed_precision_only_where_mmengine_has_it(device, expected, monkeypatch):
    monkeypatch.setattr(runtime, 'get_device', lambda: device)
    wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', optimizer=dict(type='AdamW'))
    cfg = Config(dict(launcher='none', model=dict(), optim_wrapper=wrapper))
    runtime.adapt_to_device(cfg)
    assert cfg.optim_wrapper.type == expected
    assert ('loss_scale' in cfg.optim_wrapper) == (expected == 'AmpOptimWrapper')
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
