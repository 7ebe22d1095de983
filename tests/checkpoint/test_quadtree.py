from pathlib import Path

import golden
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmattn.backbones.quadtree import QuadTree
from mmattn.checkpoint import CheckpointError, load_checkpoint

CLS = 'quadtree_b1_cls_224'
DET = 'quadtree_b1_det_256x320'
CONFIGS = Path(__file__).parents[2] / 'configs/quadtree'


@pytest.fixture(autouse=True)
def no_default_scope_is_left():
    yield
    DefaultScope._instance_dict.clear()


def b1(**options):
    return QuadTree('b1', **dict(topks=8) | options)


def published(case=CLS):
    return {name: value.float() for name, value in golden.state_dict(case).items()}


def whole_model(backbone, **heads):
    """A detector or segmentor, as far as loading is concerned."""
    model = nn.Module()
    model.backbone = backbone
    for name, head in heads.items():
        setattr(model, name, head)
    return model


def classifier(num_classes=1000):
    from mmpretrain.registry import MODELS

    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='QuadTree', arch='b1', topks=8, value_act='GELU', out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=512),
        )
    ).eval()


def test_mmpretrain_classifier_is_the_published_one():
    case, model = golden.Case(CLS), classifier().double()
    report = load_checkpoint(model, {'model': golden.state_dict(CLS)})
    assert report.format == 'published quadtree classifier'
    assert not report.dropped and not report.fresh and not report.resized
    with torch.no_grad():
        logits = model(case.image, mode='tensor')
    assert case.output_error('logits', logits) < 1e-9


def test_other_number_of_classes_leaves_the_head_fresh():
    state, model = published(), classifier(10)
    report = load_checkpoint(model, state)
    assert set(report.fresh) == {'head.fc.weight', 'head.fc.bias'}
    assert torch.equal(model.backbone.norm4.weight, state['norm4.weight'])


def test_classifier_in_a_backbone_brings_all_norms():
    """The stages' norms are part of the body, the last one too; only the linear layer is of no use."""
    state, backbone = published(), b1()
    report = load_checkpoint(backbone, state)
    assert report.dropped.keys() == {'head.fc.weight', 'head.fc.bias'} and not report.fresh
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_classifier_as_start_of_a_detector():
    model = whole_model(b1(), bbox_head=nn.Linear(8, 80))
    report = load_checkpoint(model, published())
    assert set(report.fresh) == {'bbox_head.weight', 'bbox_head.bias'}
    assert report.dropped.keys() == {'head.fc.weight', 'head.fc.bias'}


@pytest.mark.parametrize('head', ['bbox_head', 'roi_head', 'decode_head'])
def test_detector_and_segmentor_files(head):
    """Our names of the backbone, the frameworks' own for all else."""
    file = {f'backbone.{name}': value for name, value in published(DET).items()}
    file |= {f'{head}.weight': torch.randn(80, 8), f'{head}.bias': torch.randn(80)}
    model = whole_model(b1(), **{head: nn.Linear(8, 80)})
    report = load_checkpoint(model, {'meta': {'epoch': 12}, 'state_dict': file})
    assert report.format == 'published quadtree model'
    assert not report.fresh and not report.dropped and not report.resized
    assert all(torch.equal(value, file[name]) for name, value in model.state_dict().items())

    report = load_checkpoint(b1(), file)
    assert report.dropped == dict.fromkeys(
        (f'{head}.weight', f'{head}.bias'), 'not of the backbone'
    )

    del file['backbone.norm2.bias']
    with pytest.raises(CheckpointError, match=r'it lacks, such as backbone\.norm2\.bias'):
        load_checkpoint(model, file)


@pytest.mark.parametrize(
    'config, names',
    [
        (
            'retinanet_quadtree_b1_1x_coco',
            ['bbox_head.retina_reg.weight', 'neck.fpn_convs.4.conv.bias'],
        ),
        (
            'mask_rcnn_quadtree_b1_1x_coco',
            ['roi_head.bbox_head.fc_cls.weight', 'rpn_head.rpn_reg.bias'],
        ),
        ('fpn_quadtree_b1_ade20k', ['decode_head.scale_heads.3.4.conv.weight']),
    ],
)
def test_files_of_our_configs_models(config, names):
    """RetinaNet and Mask R-CNN of mmdet 2, Semantic FPN of mmseg 0.x."""
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    file = {f'backbone.{name}': value for name, value in published(DET).items()}
    file |= {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not name.startswith('backbone.')
    }
    assert set(names) <= file.keys()
    report = load_checkpoint(model, {'meta': {'CLASSES': ('a', 'b')}, 'state_dict': file})
    assert report.format == 'published quadtree model'
    # The last norm makes the last stage's output; none is left out.
    assert not report.fresh and not report.dropped and not report.resized
    assert model.state_dict().keys() == file.keys()
    assert all(torch.equal(value, file[name]) for name, value in model.state_dict().items())

    # A head for other classes stays fresh, the rest is loaded.
    last = next(
        name
        for name in file
        if name.endswith(('retina_cls.weight', 'fc_cls.weight', 'conv_seg.weight'))
    )
    file[last] = file[last][:-1]
    assert load_checkpoint(model, file).fresh == [last]


def test_detector_backbone_loaded_is_the_published_one():
    case, model = golden.Case(DET), b1().double().eval()
    load_checkpoint(model, {f'backbone.{k}': v for k, v in golden.state_dict(DET).items()})
    with torch.no_grad():
        outputs = model(case.image)
    for name, out in zip(case.output_names, outputs, strict=True):
        assert case.output_error(name, out) < 1e-9


def test_pretrained_init_cfg_takes_the_same_files(tmp_path):
    state = published()
    torch.save({'state_dict': state}, tmp_path / 'published.pth')
    model = b1(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth')))
    model.init_weights()
    assert torch.equal(model.norm1.weight, state['norm1.weight'])
    assert torch.equal(model.block4[1].attn.py_att.weight, state['block4.1.attn.py_att.weight'])


def test_stages_that_are_not_built_are_dropped():
    report = load_checkpoint(b1(out_indices=(0, 1)), published())
    assert not report.fresh
    stages = {name.split('.')[1] for name in report.dropped if name.startswith('backbone.')}
    assert stages == {'patch_embed3', 'block3', 'norm3', 'patch_embed4', 'block4', 'norm4'}


def test_own_file_is_read_again():
    backbone = b1(out_indices=(1, 3))
    report = load_checkpoint(b1(out_indices=(1, 3)), backbone.state_dict())
    assert report.format == 'published quadtree backbone'
    assert not report.fresh and not report.dropped


def test_files_of_another_type_or_size_do_not_fit():
    model = b1()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'quadtree backbone .* does not fit'):
        load_checkpoint(model, published('quadtree_a_b0_det_224'))
    type_b = published()
    with pytest.raises(CheckpointError, match=r'cannot use, such as .*block1\.0\.attn\.py_att'):
        load_checkpoint(b1(attn_type='A'), type_b)
    type_a = {
        name: v for name, v in type_b.items() if 'py_att' not in name and 'value_' not in name
    }
    with pytest.raises(
        CheckpointError, match=r'it lacks, such as .*block1\.0\.attn\.value_branchs'
    ):
        load_checkpoint(model, type_a)
    with pytest.raises(CheckpointError, match='is no quadtree'):
        load_checkpoint(model, {'block1.0.attn.q.weight': torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
