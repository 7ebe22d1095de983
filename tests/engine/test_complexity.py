"""mmengine's FLOP counter, and the stock get_flops.py of OpenMMLab, on our models."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.counting import FUSED_ON_CPU
from helpers.small_backbones import KINDS, small
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = Path(__file__).parents[2] / 'configs'
OPERATORS = {
    'gcvit': {'window_attention'},
    'dat': {'window_attention', 'deform_attention'},
    'dat++': {'neighborhood_attention', 'deform_attention'},
    'quadtree': {'quadtree_level', 'scaled_dot_product_attention'},
    'quadtree A': {'quadtree_level'},
}
# Tool, config, image side. mmengine counts norms, the metafiles do not: 0.3 to 0.9 % here.
MODELS = [
    ('mmpretrain', 'gcvit/gcvit_xxt_imagenet', 224),
    ('mmpretrain', 'dat/dat_t_imagenet', 224),
    ('mmpretrain', 'quadtree/quadtree_b1_imagenet', 224),
    ('mmseg', 'dat/fpn_dat_tpp_ade20k', 512),
    ('mmseg', 'quadtree/fpn_quadtree_b0_ade20k', 512),
]


@pytest.mark.parametrize('kind', KINDS)
def test_operators_count_as_in_torch(kind, monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'compiled')
    model, images = small(kind), torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        found = FlopAnalyzer(model, images).by_operator()
        activations = ActivationAnalyzer(model, images).by_operator()
        with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
            model(images)
    expected = counter.get_flop_counts()['Global']
    for name in OPERATORS[kind]:
        assert found[name] > 0 and activations[name] > 0
    ours = {str(op).split('.')[-1]: n // 2 for op, n in expected.items() if 'mmattn' in str(op)}
    assert {name: found[name] for name in ours} == ours
    # Which torch does not count.
    others = sum(found[name] for name in ('layer_norm', 'group_norm', 'upsample_nearest2d'))
    assert sum(found.values()) - others == counter.get_total_flops() // 2


@pytest.mark.parametrize('package, name, side', MODELS)
def test_stock_get_flops_counts_as_the_metafile(package, name, side, monkeypatch, capsys):
    site = Path(importlib.util.find_spec(package).origin).parent
    config = CONFIGS / f'{name}.py'
    argv = ['get_flops.py', str(config), '--shape', str(side), str(side)]
    monkeypatch.setattr(sys, 'argv', argv)
    runpy.run_path(str(site / '.mim/tools/analysis_tools/get_flops.py'), run_name='__main__')
    number, unit = re.search(r'Flops: ([\d.]+)([GT])', capsys.readouterr().out).groups()
    metafile = yaml.safe_load((config.parent / 'metafile.yml').read_text())
    (stated,) = (
        entry['Metadata']['FLOPs'] for entry in metafile['Models'] if entry['Name'] == config.stem
    )
    assert float(number) * {'G': 1e9, 'T': 1e12}[unit] == pytest.approx(stated, rel=0.01)
