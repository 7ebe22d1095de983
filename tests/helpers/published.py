"""Files in the formats of the authors and timm, made from our models.

The rules are independent of mmattn.checkpoint; `tests/checkpoint/test_published_files.py` compares
their names and shapes with the published lists.
"""

import argparse
import re
import sys
import types
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from helpers import golden

CONFIGS = Path(__file__).parents[2] / 'configs'

# All kinds of blocks of each family at a fraction of their size.
SMALL = {
    'gcvit': dict(
        embed_dims=32, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2, layer_scale=1e-5
    ),
    'dat': dict(
        dims=(16, 32, 64, 128),
        blocks=('LS', 'LS', 'LDLD', 'LD'),
        num_heads=(1, 2, 4, 8),
        groups=(0, 0, 2, 4),
    ),
    'dat++': dict(
        dims=(16, 32, 64, 128),
        blocks=('ND', 'NDND', 'ND', 'DD'),
        num_heads=(1, 2, 4, 8),
        groups=(1, 1, 2, 4),
        strides=(8, 4, 2, 1),
        plus_plus=True,
        offset_range=None,
    ),
    'quadtree': dict(embed_dims=(16, 32, 40, 64), depths=(1, 1, 2, 1)),
}
DIMS = {
    name: arch.get('dims') or arch['embed_dims'] for name, arch in SMALL.items() if name != 'gcvit'
} | {'gcvit': (32, 64, 128, 256)}


# ------------------------------------------------------------------------------------- models


def build(config, size='real', num_classes=None, **backbone):
    """Build the model of a config, such as 'gcvit/gcvit_xxt_imagenet', real or small."""
    cfg = _read(config)
    model = deepcopy(cfg.model)
    model.backbone.pop('init_cfg', None)
    if size == 'small':
        family = config.split('/')[0]
        kind = 'dat++' if str(model.backbone.arch).endswith('++') else family
        model.backbone.arch = SMALL[kind]
        dims = DIMS[kind]
        indices = model.backbone.get('out_indices', (0, 1, 2, 3))
        consumer = model.get('neck') or model.get('decode_head')
        if consumer.get('type') == 'GlobalAveragePooling':
            model.head.in_channels = dims[-1]
        else:
            consumer.in_channels = [dims[i] for i in indices]
        if 'auxiliary_head' in model:
            model.auxiliary_head.in_channels = dims[2]
        _set_where_present(model, fc_out_channels=16, conv_out_channels=8, channels=16)
    if num_classes:
        _set_where_present(model, num_classes=num_classes)
    model.backbone.update(backbone)
    init_default_scope(cfg.default_scope)
    return MODELS.build(model)


_read = cache(lambda config: Config.fromfile(CONFIGS / f'{config}.py'))


def _set_where_present(node, **values):
    if isinstance(node, list):
        for child in node:
            _set_where_present(child, **values)
    elif isinstance(node, dict):
        node.update({name: value for name, value in values.items() if name in node})
        for child in node.values():
            _set_where_present(child, **values)


def fill(model, seed):
    """Fill all parameters and saved buffers with random values."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.empty(value.shape).normal_(generator=generator))
        else:
            value.fill_(seed)
    return model


# -------------------------------------------------------------------------------- authors' names


def gcvit_names(state):
    """Convert our names to the authors', with an index buffer for each table."""
    out = {}
    for name, value in state.items():
        name = name.replace('stem.proj.', 'patch_embed.proj.')
        name = name.replace('stem.downsample.', 'patch_embed.conv_down.')
        name = re.sub(
            r'^stages\.(\d)\.downsample\.', lambda m: f'levels.{int(m[1]) - 1}.downsample.', name
        )
        name = re.sub(r'^stages\.', 'levels.', name)
        name = name.replace('.global_query.steps.', '.q_global_gen.to_q_global.')
        out[name] = value
        if name.endswith('relative_position_bias_table'):
            window = (round(value.shape[0] ** 0.5) + 1) // 2
            index = torch.zeros(window**2, window**2, dtype=torch.long, device=value.device)
            out[name.replace('bias_table', 'index')] = index
    return out


def dat_names(state):
    """Convert our names to the authors', with buffers of wrong sizes and values."""
    out = {}
    plus_plus = 'stem.2.conv.weight' in state
    for name, value in state.items():
        attention = re.match(r'stages\.\d\.blocks\.\d+\.attn\.', name)
        prefix = attention and attention[0]
        is_window = attention and f'{prefix}relative_position_bias_table' in state
        is_deformable = attention and f'{prefix}q_proj.weight' in state
        if is_window:
            name = name.replace('.qkv.', '.proj_qkv.').replace('.proj.', '.proj_out.')
        if is_deformable:
            name = name.replace('.offsets.dwconv.', '.conv_offset.0.')
            name = name.replace('.offsets.norm.', '.conv_offset.1.norm.')
            name = name.replace('.offsets.proj.', '.conv_offset.3.')
            name = name.replace('.attn.proj.', '.attn.proj_out.')
            name = re.sub(r'\.([qkv])_proj\.', r'.proj_\1.', name)
            name = name.replace('.position_bias.table', '.rpe_table')
        mlp = '.mlp.fc' in name
        name = re.sub(
            r'\.mlp\.fc([12])\.',
            r'.mlp.linear\1.0.' if plus_plus else r'.mlp.chunk.linear\1.',
            name,
        )
        name = name.replace('.mlp.dwconv.', '.mlp.dwc.')
        is_1x1 = (is_deformable and '.proj_' in name) or '.conv_offset.3.' in name
        if value.ndim == 2 and (is_1x1 or (mlp and plus_plus)):
            value = value[:, :, None, None]
        for ours, theirs in (
            (r'^stem\.0\.conv\.', 'patch_proj.0.'),
            (r'^stem\.0\.norm\.', 'patch_proj.1.norm.'),
            (r'^stem\.2\.conv\.', 'patch_proj.3.'),
            (r'^stem\.2\.norm\.', 'patch_proj.4.norm.'),
            (r'^stem\.conv\.', 'patch_proj.0.'),
            (r'^stem\.norm\.', 'patch_proj.1.norm.'),
            (r'^stages\.(\d)\.downsample\.conv\.', lambda m: f'down_projs.{int(m[1]) - 1}.0.'),
            (r'^stages\.(\d)\.downsample\.norm\.', lambda m: f'down_projs.{int(m[1]) - 1}.1.norm.'),
            (
                r'^stages\.(\d)\.blocks\.(\d+)\.norm([12])\.',
                lambda m: f'stages.{m[1]}.layer_norms.{2 * int(m[2]) + int(m[3]) - 1}.norm.',
            ),
            (r'^stages\.(\d)\.blocks\.(\d+)\.attn\.', r'stages.\1.attns.\2.'),
            (r'^stages\.(\d)\.blocks\.(\d+)\.mlp\.', r'stages.\1.mlps.\2.'),
            (r'^stages\.(\d)\.blocks\.(\d+)\.conv\.', r'stages.\1.local_perception_units.\2.'),
            (r'^norm(\d)\.', r'norms.\1.norm.'),
        ):
            name = re.sub(ours, theirs, name)
        out[name] = value
        if name.endswith('relative_position_bias_table'):
            stem = name.rpartition('.')[0]
            out[f'{stem}.relative_position_index'] = torch.full((5, 5), 10**6)
            if stem.endswith('.attns.1'):  # of the windows, those that are shifted
                out[f'{stem}.attn_mask'] = torch.full((4, 5, 5), torch.nan)
    return out


def quadtree_names(state):
    """Convert our names to the authors', which count stages from 1."""
    out = {}
    for name, value in state.items():
        if value.ndim == 2 and re.search(r'\.attn\.[qkv]_proj\.weight$', name):
            value = value[:, :, None, None]
        for ours, theirs in (
            (r'^stem\.conv\.', 'patch_embed1.proj.'),
            (r'^stem\.norm\.', 'patch_embed1.norm.'),
            (r'^stages\.(\d)\.downsample\.conv\.', lambda m: f'patch_embed{int(m[1]) + 1}.proj.'),
            (r'^stages\.(\d)\.downsample\.norm\.', lambda m: f'patch_embed{int(m[1]) + 1}.norm.'),
            (r'^stages\.(\d)\.blocks\.', lambda m: f'block{int(m[1]) + 1}.'),
            (r'^stages\.(\d)\.norm\.', lambda m: f'norm{int(m[1]) + 1}.'),
            (r'\.attn\.level_weights$', '.attn.py_att.weight'),
            (r'\.attn\.lepe\.', '.attn.py_att.get_vs.'),
            (r'\.attn\.value_branches\.', '.attn.value_branchs.'),
            (r'\.mlp\.dwconv\.', '.mlp.dwconv.dwconv.'),
        ):
            name = re.sub(ours, theirs, name)
        out[name] = value
    return out


NAMES = {'gcvit': gcvit_names, 'dat': dat_names, 'quadtree': quadtree_names}
# Last norm and linear layer of a classifier; QuadTree's norm belongs to the backbone.
CLASSIFIERS = {
    'gcvit': {'backbone.norm3.': 'norm.', 'head.fc.': 'head.'},
    'dat': {'backbone.norm3.': 'cls_norm.norm.', 'head.fc.': 'cls_head.'},
    'quadtree': {'head.fc.': 'head.'},
}


def classifier_file(model, family):
    """Weights of an ImageNet classifier by the authors' names."""
    state, top = {}, {}
    for name, value in model.state_dict().items():
        prefix = next((p for p in CLASSIFIERS[family] if name.startswith(p)), None)
        if prefix:
            top[CLASSIFIERS[family][prefix] + name.removeprefix(prefix)] = value
        else:
            state[name.removeprefix('backbone.')] = value
    return NAMES[family](state) | top


def model_file(model, family):
    """Weights of a detector of mmdet 2 or segmentor of mmseg 0.x, whose heads have our names."""
    state = model.state_dict()
    body = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    heads = {name: value for name, value in state.items() if not name.startswith('backbone.')}
    return {f'backbone.{name}': value for name, value in NAMES[family](body).items()} | heads


def own_file(model, family):
    """Weights by our names, as trainings write them."""
    return model.state_dict()


def timm_names(state):
    """Convert names of GC ViT's authors to timm's."""
    out = {}
    for name, value in state.items():
        if name.endswith('_index'):
            continue
        if '.conv.2.fc.' in name:
            value = value[:, :, None, None]
        for ours, theirs in (
            ('conv.0', 'conv_dw'),
            ('conv.2.fc.0', 'se.fc1'),
            ('conv.2.fc.2', 'se.fc2'),
            ('conv.3', 'conv_pw'),
        ):
            name = name.replace(f'.{ours}.', f'.conv_block.{theirs}.')
        name = re.sub(
            r'levels\.(\d)\.downsample', lambda m: f'stages.{int(m[1]) + 1}.downsample', name
        )
        name = re.sub(
            r'levels\.(\d)\.q_global_gen\.to_q_global\.(\d)\.conv_block',
            lambda m: f'stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}',
            name,
        )
        name = re.sub(r'^levels\.', 'stages.', name)
        name = name.replace('patch_embed.proj', 'stem.conv1').replace(
            'patch_embed.conv_down', 'stem.down'
        )
        name = name.replace('relative_position_bias_table', 'rel_pos.relative_position_bias_table')
        name = re.sub(r'\.gamma([12])$', r'.ls\1.gamma', name)
        name = re.sub(r'^norm\.', 'stages.3.norm.', name)
        out[re.sub(r'^head\.', 'head.fc.', name)] = value
    return out


def timm_file(model, family):
    assert family == 'gcvit'
    return timm_names(classifier_file(model, family))


# ------------------------------------------------------------------------------------ containers


class CfgNode(dict):
    """Stand-in for yacs's CfgNode, in which Swin's and similar training programs save options."""

    __module__ = 'yacs.config'


def _save_swin_training(state, path):
    options = CfgNode(MODEL=CfgNode(TYPE='dat'))
    options.__dict__['__immutable__'] = True
    sys.modules['yacs'], sys.modules['yacs.config'] = (
        types.ModuleType('yacs'),
        sys.modules[__name__],
    )
    try:
        content = dict(model=state, optimizer=_optimizer(), max_accuracy=82.0, config=options)
        torch.save(content, path)
    finally:
        del sys.modules['yacs'], sys.modules['yacs.config']


def _save_safetensors(state, path):
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, path)


def _optimizer():
    return dict(state={0: dict(step=torch.tensor(2.0))}, param_groups=[dict(lr=1e-4, params=[0])])


def _timm_training(state):
    options = argparse.Namespace(lr=5e-3, model='gc_vit_tiny', mean=None)
    return dict(
        epoch=299, arch=options.model, state_dict=state, optimizer=_optimizer(), version=2,
        args=options, amp_scaler=dict(scale=65536.0), metric=np.float64(83.4),
    )  # fmt: skip


def _timm_training_with_average(state):
    """Both sets of weights; the average is told from the other by its values."""
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    return _timm_training(state) | dict(state_dict_ema=average)


def _deit_training(state):
    scheduler = dict(t_initial=300, lr_min=1e-5, warmup_t=5, base_values=[5e-4, 5e-4])
    options = argparse.Namespace(model='quadtree', batch_size=128, mixup=0.8, cutmix_minmax=None)
    return dict(
        model=state, optimizer=_optimizer(), lr_scheduler=scheduler, epoch=299,
        scaler=dict(scale=65536.0, _growth_tracker=7), args=options,
    )  # fmt: skip


def _mmdet_2(state):
    meta = dict(epoch=36, iter=9, config='model = dict()', CLASSES=('a', 'b'), mmdet_version='2.19')
    return dict(meta=meta, state_dict=state, optimizer=_optimizer())


def _mmengine(state):
    logs = HistoryBuffer(np.array([0.5, 0.25]), np.array([1, 1]))
    hub = dict(log_scalars={'train/loss': logs}, runtime_info=dict(iter=2, seed=np.uint32(7)))
    meta = dict(epoch=1, cfg='model = dict()', dataset_meta=dict(classes=('a',)), seed=7)
    return dict(
        meta=meta, state_dict=state, message_hub=hub, optimizer=_optimizer(), param_schedulers=[]
    )


def _in(wrap, **options):
    return lambda state, path: torch.save(wrap(state), path, **options)


# Functions that write a state dict to a file: (state, path) -> None.
CONTAINERS = {
    'bare': _in(dict),
    'state_dict': _in(lambda state: {'state_dict': state, 'epoch': 3}),
    'model': _in(lambda state: {'model': state}),
    'state_dict_ema': _in(lambda state: {'state_dict_ema': state}),
    'model_ema': _in(lambda state: {'model_ema': state}),
    'module.': _in(lambda state: {'model': {f'module.{name}': v for name, v in state.items()}}),
    'torch before 1.6': _in(dict, _use_new_zipfile_serialization=False),
    "timm's training": _in(_timm_training),
    "timm's training with an average": _in(_timm_training_with_average),
    "DeiT's training": _in(_deit_training),
    "Swin's training": _save_swin_training,
    'mmdet 2': _in(_mmdet_2),
    'mmengine': _in(_mmengine),
    'safetensors': _save_safetensors,
}


def golden_model_file(model, case):
    """Weights of a detector: the backbone of a golden case, and the model's heads."""
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    return {f'backbone.{k}': v for k, v in golden.state_dict(case).items()} | heads


def bare(backbone):
    """Model that holds nothing but a backbone."""
    model = nn.Module()
    model.backbone = backbone
    return model
