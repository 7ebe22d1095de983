"""Effective values of every config's recipe against the official ones, which recipes.yml holds.

Optimizers, schedules and pipelines are built as the Runner builds them, on models without memory.
"""

import math
import warnings
from bisect import bisect_right
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    MODELS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    init_default_scope,
)
from torch.nn.modules.batchnorm import _BatchNorm

import mmattn  # noqa: F401  registers the backbones
from mmattn.layers import ScaledResidual

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
ROWS = yaml.safe_load(Path(__file__).with_name('recipes.yml').read_text())['rows']
RECIPES = [(name, row) for row in ROWS for name in row['configs']]
EVERY_CONFIG = pytest.mark.parametrize(('name', 'row'), RECIPES, ids=[name for name, _ in RECIPES])
pytestmark = pytest.mark.usefixtures('no_metafiles')

# Images that are trained on in an epoch.
IMAGES = dict(ImageNet=1281167, CocoDataset=117266)
PHOTOGRAPH = (333, 500)


@pytest.fixture(autouse=True)
def a_gpu_for_mixed_precision(monkeypatch):
    """AmpOptimWrapper looks for a GPU as it is built; here, it trains nothing."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)


@cache
def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@cache
def build(name):
    cfg = read(name)
    init_default_scope(cfg.default_scope)
    # The constructor of mmdet's PVT v2 reads values of tensors.
    with torch.device('cpu' if 'pvtv2' in name else 'meta'):
        return MODELS.build(cfg.model)


@cache
def optimizer_wrapper(name):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*GradScaler', category=UserWarning)
        return build_optim_wrapper(build(name), read(name).optim_wrapper)


def test_every_config_has_one_row():
    leaves = [path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts]
    names = [str(path.relative_to(CONFIGS).with_suffix('')) for path in leaves]
    assert sorted(name for name in names if '/demo_' not in name) == sorted(
        name for name, _ in RECIPES
    )


def test_rows_say_what_is_our_own():
    marks = {'GPUs', 'drop path', *ROWS[0]}
    for row in ROWS:
        assert set(row['ours']) <= marks
        assert row['source'] and bool(row['ours']) == bool(row.get('why'))


# ---- Optimizer


@EVERY_CONFIG
def test_images_a_step(name, row):
    on_a_gpu, gpus = row['images']
    cfg = read(name)
    assert cfg.train_dataloader.batch_size == on_a_gpu
    assert cfg.auto_scale_lr.base_batch_size == on_a_gpu * gpus
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == 1


def kind_of(name, parameter, module):
    if name.endswith('relative_position_bias_table') or '.position_bias.' in name:
        return 'tables'
    norms = (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm)
    if isinstance(module, norms) and not name.startswith('backbone.'):
        return 'head norms'
    if isinstance(module, norms):
        return 'group norms' if isinstance(module, torch.nn.GroupNorm) else 'layer norms'
    if name.endswith('bias'):
        return 'biases'
    return 'vectors' if parameter.ndim == 1 else 'weights'


@EVERY_CONFIG
def test_decay_and_rate_of_each_parameter(name, row):
    model, optimizer = build(name), optimizer_wrapper(name).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults['betas'] == (0.9, 0.999)
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    peak = read(name).optim_wrapper.optimizer.lr
    decays = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(path, recurse=False):
            group = groups.pop(id(parameter))
            part = own.split('.')[0]
            assert group['lr'] == pytest.approx(peak * row['multipliers'].get(part, 1)), own
            kind = kind_of(own, parameter, module)
            decays.setdefault(kind, {})[own] = group['weight_decay']
    assert not groups
    for kind, found in decays.items():
        assert set(found.values()) == {row['decay'][kind]}, (kind, found)


@EVERY_CONFIG
def test_precision_and_clipping(name, row):
    wrapper = optimizer_wrapper(name)
    mixed = {'OptimWrapper': 'float32', 'AmpOptimWrapper': 'mixed'}
    assert mixed[type(wrapper).__name__] == row['precision']
    norm = (wrapper.clip_grad_kwargs or {}).get('max_norm')
    assert norm == row['clip']


# ---- Schedule


@cache
def simulate(schedulers, peak, epoch_length, epochs):
    """Learning rates as (first iteration, rate) wherever it changes, stepped as by the hook."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    built = []
    for text in schedulers:
        scheduler = ConfigDict(yaml.safe_load(text))
        if scheduler.get('by_epoch', True):
            scheduler.setdefault('end', epochs)
        built.append(
            PARAM_SCHEDULERS.build(
                scheduler, default_args=dict(optimizer=optimizer, epoch_length=epoch_length)
            )
        )
    optimizer.step()
    rates = [(0, optimizer.param_groups[0]['lr'])]
    for epoch in range(epochs):
        start = epoch * epoch_length
        for iteration in range(start + 1, start + epoch_length + 1):
            active = [s for s in built if not s.by_epoch and s.end > iteration]
            if not active:
                break
            for scheduler in active:
                scheduler.step()
            rates.append((iteration, optimizer.param_groups[0]['lr']))
        for scheduler in built:
            if scheduler.by_epoch:
                scheduler.step()
        rates.append((start + epoch_length, optimizer.param_groups[0]['lr']))
    return rates


def rate_at(rates, iteration):
    return rates[bisect_right(rates, iteration, key=lambda change: change[0]) - 1][1]


@EVERY_CONFIG
def test_learning_rate(name, row):
    cfg = read(name)
    init_default_scope(cfg.default_scope)
    epochs = row['length'].get('epochs', 1)
    if 'iterations' in row['length']:
        assert cfg.train_cfg.max_iters == row['length']['iterations']
        epoch_length = cfg.train_cfg.max_iters
    else:
        assert cfg.train_cfg.max_epochs == epochs
        images = IMAGES[cfg.train_dataloader.dataset.type]
        epoch_length = math.ceil(images / math.prod(row['images']))
    peak = cfg.optim_wrapper.optimizer.lr
    texts = tuple(yaml.safe_dump(s.to_dict()) for s in cfg.param_scheduler)
    rates = simulate(texts, peak, epoch_length, epochs)
    warmup = row['warmup'].get('iterations', row['warmup'].get('epochs', 0) * epoch_length)
    marks = (0, warmup, epochs * epoch_length - 1)
    found = [rate_at(rates, iteration) for iteration in marks]
    assert found == pytest.approx(row['rate'], rel=1e-3, abs=2e-4 * peak)
    if warmup:  # linear
        halfway = sum(row['rate'][:2]) / 2
        assert rate_at(rates, warmup // 2) == pytest.approx(halfway, rel=0.01)


@EVERY_CONFIG
def test_moving_average(name, row):
    hooks = [hook for hook in read(name).get('custom_hooks', []) if hook.type == 'EMAHook']
    assert [1 - hook.momentum for hook in hooks] == ([row['ema']] if row['ema'] else [])


# ---- Model


@EVERY_CONFIG
def test_drop_path_of_each_block(name, row):
    backbone = build(name).backbone
    if 'pvtv2' in name:
        blocks = [block for layers in backbone.layers for block in layers[1]]
        rates = [block.attn.dropout_layer.drop_prob for block in blocks]
    else:
        rates = [m.rate for m in backbone.modules() if isinstance(m, ScaledResidual)]
    expected = np.linspace(0, row['configs'][name], len(rates))
    assert rates == pytest.approx(expected.tolist(), abs=1e-6)


# ---- Data


def geometry(steps):
    """Sizes of a photograph after each of some transforms."""
    sizes = []
    image = np.zeros((*PHOTOGRAPH, 3), 'uint8')
    data = dict(img=image, img_shape=PHOTOGRAPH, ori_shape=PHOTOGRAPH)
    for step in steps:
        data = TRANSFORMS.build(step)(data)
        assert data['img_shape'] == data['img'].shape[:2]
        sizes.append(list(data['img_shape']))
    return sizes


def between_loading_and_packing(pipeline):
    return [step for step in pipeline if step.type[:4] not in ('Load', 'Pack')]


@EVERY_CONFIG
def test_sizes_in_testing(name, row):
    cfg = read(name)
    init_default_scope(cfg.default_scope)
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline
    steps = between_loading_and_packing(cfg.test_dataloader.dataset.pipeline)
    assert geometry(steps) == row['test']
    if 'scales' in row:
        resizes = cfg.tta_pipeline[1].transforms[0]
        assert [geometry([step])[0][0] for step in resizes] == row['scales']


@EVERY_CONFIG
def test_training_images(name, row):
    cfg = read(name)
    init_default_scope(cfg.default_scope)
    steps = between_loading_and_packing(cfg.train_dataloader.dataset.pipeline)
    for step in steps:
        TRANSFORMS.build(step)
    assert [step.type for step in steps] == row['train']
    if steps[0].type == 'RandomResizedCrop':
        assert [steps[0].scale] * 2 == row['test'][-1]
    augments = (cfg.model.get('train_cfg') or {}).get('augments', [])
    assert {augment.type: augment.alpha for augment in augments} == row['mixing']
    sampler = DATA_SAMPLERS.build(dict(cfg.train_dataloader.sampler, dataset=range(12), seed=0))
    assert set(Counter(islice(sampler, 12)).values()) == {row['repeats']}
