"""Layer-wise learning rates in the models of all three packages, beside mmpretrain's Swin."""

import re

import pytest
from helpers.small_backbones import KINDS, small
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import SwinTransformer
from torch import nn

LR, RATE = 0.1, 0.5  # powers of a half are exact
OURS, MMPRETRAIN = 'LayerDecayConstructor', 'mmpretrain.LearningRateDecayOptimWrapperConstructor'
every_kind = pytest.mark.parametrize('kind', KINDS)


class Model(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(3, 3)

    def get_layer_depth(self, name):
        return self.backbone.get_layer_depth(name, 'backbone.')


def rates(model, constructor, **paramwise):
    """Learning rate of each parameter by its name."""
    config = dict(
        optimizer=dict(type='SGD', lr=LR, weight_decay=0.1),
        constructor=constructor,
        paramwise_cfg=dict(layer_decay_rate=RATE, **paramwise),
    )
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group['lr'] for group in groups for p in group['params']}


def by_place(learning_rates, downsampling_of):
    """Learning rates by what a layer is: stem, block, downsampling or what comes after."""
    places = {}
    for name, rate in learning_rates.items():
        match = re.match(r'backbone\.stages\.(\d)\.(blocks\.\d|downsample)', name)
        if match and match[2] == 'downsample':
            place = f'downsampling before stage {int(match[1]) + downsampling_of}'
        elif match:
            place = f'stage {match[1]} {match[2]}'
        elif name.startswith(('backbone.stem.', 'backbone.patch_embed.')):
            place = 'stem'
        elif name.startswith('backbone.stages.'):
            continue  # norms of a stage, and GC ViT's query, which Swin has not
        else:
            place = 'after'
        places.setdefault(place, set()).add(rate)
    return places


@every_kind
@pytest.mark.parametrize('constructor', [OURS, MMPRETRAIN])
def test_groups_are_those_of_mmpretrains_swin(kind, constructor):
    backbone = small(kind)
    depths = [len(stage.blocks) for stage in backbone.stages]
    arch = dict(embed_dims=16, depths=depths, num_heads=[1, 2, 4, 8])
    swin = rates(Model(SwinTransformer(arch, img_size=64, window_size=2)), MMPRETRAIN)
    expected = by_place(swin, downsampling_of=1)
    assert by_place(rates(Model(backbone), constructor), downsampling_of=0) == expected
    assert expected['stem'] == {LR * RATE ** (sum(depths) + 1)}
    assert expected['after'] == {LR}


@every_kind
def test_both_constructors_agree_on_every_parameter(kind):
    model = Model(small(kind))
    assert rates(model, OURS) == rates(model, MMPRETRAIN)


@pytest.mark.parametrize(
    'scope, config',
    [
        (
            'mmdet',
            dict(
                type='RetinaNet',
                neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=8, num_outs=5),
                bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8),
            ),
        ),
        (
            'mmseg',
            dict(
                type='EncoderDecoder',
                decode_head=dict(
                    type='FCNHead', in_channels=256, channels=8, num_classes=2, in_index=3
                ),
            ),
        ),
        (
            'mmpretrain',
            dict(
                type='ImageClassifier',
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=2, in_channels=256),
            ),
        ),
    ],
)
def test_models_of_every_package(scope, config):
    backbone, arch, options = KINDS['gcvit']
    config['backbone'] = dict(type=backbone.__name__, arch=arch, frozen_stages=1, **options)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config)
        found = rates(model, OURS, custom_keys=dict(norm1=dict(lr_mult=0.1)))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in found.items():
        depth, count = model.backbone.get_layer_depth(name, 'backbone.')
        expected = LR * RATE ** (count - 1 - depth) * (0.1 if 'norm1' in name else 1)
        assert rate == pytest.approx(expected), name
        assert (rate == LR) == (not name.startswith('backbone.stages')) or 'norm1' in name


@pytest.mark.parametrize('rate', [None, 0, 1.1, '0.9'])
def test_a_rate_out_of_range_is_an_error(rate):
    config = dict(
        optimizer=dict(type='SGD', lr=LR),
        constructor=OURS,
        paramwise_cfg=dict(layer_decay_rate=rate),
    )
    with pytest.raises(ValueError, match='layer_decay_rate must be above 0 and at most 1, got'):
        build_optim_wrapper(Model(small('gcvit')), config)


def test_a_backbone_without_depths_is_an_error():
    with pytest.raises(TypeError, match='get_layer_depth, got Linear in Model'):
        rates(Model(nn.Linear(2, 2)), OURS)
    config = dict(
        optimizer=dict(type='Rprop'), constructor=OURS, paramwise_cfg=dict(layer_decay_rate=0.9)
    )
    with pytest.raises(ValueError, match='optimizer must have an lr'):
        build_optim_wrapper(Model(small('gcvit')), config)
