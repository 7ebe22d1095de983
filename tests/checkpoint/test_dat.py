import re
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmattn.backbones import DAT
from mmattn.checkpoint import CheckpointError, load_checkpoint

CONFIGS = Path(__file__).parents[2] / 'configs/dat'

# All letters of DAT's variants at a fraction of their size.
DAT_ARCH = dict(
    dims=(16, 32, 64, 128),
    blocks=('LS', 'LS', 'LDLD', 'LD'),
    num_heads=(1, 2, 4, 8),
    groups=(0, 0, 2, 4),
)
PLUS_ARCH = dict(
    dims=(16, 32, 64, 128),
    blocks=('ND', 'NDND', 'ND', 'DD'),
    num_heads=(1, 2, 4, 8),
    groups=(1, 1, 2, 4),
    strides=(8, 4, 2, 1),
    plus_plus=True,
    offset_range=None,
)
ARCHS = {'DAT': DAT_ARCH, 'DAT++': PLUS_ARCH}


@pytest.fixture(autouse=True)
def no_default_scope_is_left():
    yield
    DefaultScope._instance_dict.clear()


def small(kind='DAT', seed=0, **options):
    torch.manual_seed(seed)
    model = DAT(ARCHS[kind], **dict(img_size=96, window_size=3) | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def as_published(state, buffers=True):
    """Our names turned into the publications', by rules in the other direction.

    ``buffers``: also those that the published modules save, of sizes and values that fit nothing.
    """
    out = {}
    plus_plus = 'patch_proj.3.weight' in state
    for name, value in state.items():
        if not plus_plus:
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.conv\.', r'\1.0.', name)
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.norm\.', r'\1.1.', name)
        name = re.sub(r'^norm(\d)\.', r'norms.\1.norm.', name)
        name = re.sub(r'\.(layer_norms\.\d+)\.', r'.\1.norm.', name)
        table = re.sub(r'\.(qkv|proj)\.\w+$', '.relative_position_bias_table', name)
        if table != name and table in state:
            name = name.replace('.qkv.', '.proj_qkv.').replace('.proj.', '.proj_out.')
        if '.mlps.' in name and '.fc' in name:
            linear = r'.linear\1.0.' if plus_plus else r'.chunk.linear\1.'
            name = re.sub(r'\.fc([12])\.', linear, name)
            value = value[:, :, None, None] if plus_plus and value.ndim == 2 else value
        out[name] = value
        if buffers and name.endswith('relative_position_bias_table'):
            stem = name.rpartition('.')[0]
            out[f'{stem}.relative_position_index'] = torch.full((5, 5), 10**6)
            if stem.endswith('.attns.1'):  # of the windows, those that are shifted
                out[f'{stem}.attn_mask'] = torch.full((4, 5, 5), torch.nan)
    return out


def as_classifier(state, num_classes=1000):
    """The published classifier's file: a norm and a linear layer after the last stage."""
    out = {name: value for name, value in state.items() if not name.startswith('norms.')}
    dim = state['down_projs.2.0.weight'].shape[0]
    return out | {
        'cls_norm.norm.weight': torch.rand(dim),
        'cls_norm.norm.bias': torch.rand(dim),
        'cls_head.weight': torch.rand(num_classes, dim),
        'cls_head.bias': torch.rand(num_classes),
    }


def assert_same_values(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_the_files_made_here_have_the_published_names():
    """Names and shapes, to the last one: what follows tests with small models of the same names."""
    with torch.device('meta'):
        dat, plus = DAT('tiny', out_indices=(3,)), DAT('tiny++')
    shapes = {k: list(v.shape) for k, v in as_published(plus.state_dict()).items()}
    assert shapes == golden.shapes('datpp_t_det_200x333')
    for model, case in ((dat, 'dat_t_cls_224'), (plus, 'datpp_t_cls_224')):
        state = as_classifier(as_published(model.state_dict()))
        published = golden.shapes(case)
        assert state.keys() == published.keys()
        for name, value in state.items():
            if not name.endswith(('attn_mask', 'relative_position_index')):
                assert list(value.shape) == published[name], name


@pytest.mark.parametrize(
    'case_name, config', [('dat_t_cls_224', 'dat_t'), ('datpp_t_cls_224', 'dat_tpp')]
)
def test_classifier_from_our_config_is_the_published_one(case_name, config):
    cfg = Config.fromfile(CONFIGS / f'{config}_imagenet.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).double().eval()
    case = golden.Case(case_name)
    report = load_checkpoint(model, {'model': golden.state_dict(case_name)})
    assert report.format == 'published dat classifier'
    assert not report.dropped and not report.fresh and not report.resized
    with torch.no_grad():
        logits = model(case.image, mode='tensor')
    assert case.output_error('logits', logits) < 1e-9


@pytest.mark.parametrize('kind', ARCHS)
def test_classifier_in_a_backbone(kind):
    """Its norm and head are of no use there, and the output norms stay fresh."""
    source, model = small(kind), small(kind, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_checkpoint(model, as_classifier(as_published(source.state_dict())))
    assert report.format == 'published dat classifier' and not report.resized
    dropped = {name for name in report.dropped if 'attns' not in name}
    assert dropped == {
        'backbone.norm3.weight',
        'backbone.norm3.bias',
        'head.fc.weight',
        'head.fc.bias',
    }
    norms = [f'norm{i}.{part}' for i in range(4) for part in ('weight', 'bias')]
    assert sorted(report.fresh) == sorted(f'backbone.{name}' for name in norms)
    expected = source.state_dict() | {name: before[name] for name in norms}
    assert_same_values(model, expected)


@pytest.mark.parametrize('kind', ARCHS)
def test_other_number_of_classes_leaves_the_head_fresh(kind):
    model = nn.Module()
    model.backbone = small(kind, seed=1, out_indices=(3,))
    model.head = nn.Module()
    model.head.fc = nn.Linear(128, 10)
    state = as_classifier(as_published(small(kind).state_dict()))
    report = load_checkpoint(model, state)
    assert set(report.fresh) == {'head.fc.weight', 'head.fc.bias'}
    assert torch.equal(model.backbone.norm3.weight, state['cls_norm.norm.weight'])


def test_masks_and_indices_of_a_file_are_ignored():
    """They fit one image size; those of the model are made for the map at hand."""
    source, x = small(), torch.randn(1, 3, 97, 130)
    state = as_published(source.state_dict())
    ours = ('relative_position_index', 'attn_mask')
    buffers = {name for name in state if name.endswith(ours)}
    assert {name.rpartition('.')[2] for name in buffers} == set(ours)
    model = small(seed=1)
    report = load_checkpoint(model, state)
    assert report.dropped == dict.fromkeys(buffers, 'built by the model')
    assert not report.fresh and not report.resized
    for a, b in zip(model(x), source(x), strict=True):
        assert torch.equal(a, b)


# Detectors of mmdet 2 and segmentors of mmseg 0.x: config, out_indices, some names of their heads.
WHOLE_MODELS = {
    'retinanet_dat_t_1x_coco': ('DAT', ['bbox_head.retina_cls.weight']),
    'mask_rcnn_dat_tpp_1x_coco': (
        'DAT++',
        ['rpn_head.rpn_conv.weight', 'roi_head.mask_head.convs.3.conv.weight'],
    ),
    'cascade_mask_rcnn_dat_t_3x_coco': ('DAT', ['roi_head.bbox_head.2.shared_fcs.0.weight']),
    'upernet_dat_tpp_ade20k': (
        'DAT++',
        ['decode_head.psp_modules.3.1.conv.weight', 'auxiliary_head.conv_seg.weight'],
    ),
    'fpn_dat_t_ade20k': ('DAT', ['neck.fpn_convs.3.conv.weight', 'decode_head.conv_seg.weight']),
}


def whole_model(config, kind):
    """The config's own model around a small backbone."""
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    model, dims = cfg.model, ARCHS[kind]['dims']
    indices = model.backbone.get('out_indices', (0, 1, 2, 3))
    model.backbone = dict(
        type='DAT', arch=ARCHS[kind], img_size=96, window_size=3, out_indices=indices
    )
    consumer = model.neck if 'neck' in model else model.decode_head
    consumer.in_channels = [dims[i] for i in indices]
    if 'auxiliary_head' in model:
        model.auxiliary_head.in_channels = dims[2]
    init_default_scope(cfg.default_scope)
    return MODELS.build(model)


@pytest.mark.parametrize('config', WHOLE_MODELS)
def test_detector_and_segmentor_files(config):
    kind, names = WHOLE_MODELS[config]
    model = whole_model(config, kind)
    source = small(kind)
    body = as_published(source.state_dict())
    heads = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not name.startswith('backbone.')
    }
    assert set(names) <= heads.keys()
    file = {f'backbone.{name}': value for name, value in body.items()} | heads
    assert 'backbone.norms.3.norm.weight' in file
    report = load_checkpoint(model, {'meta': {'CLASSES': ('a', 'b')}, 'state_dict': file})
    assert report.format == 'published dat model'
    assert not report.fresh and not report.resized
    built = {f'norm{i}' for i in model.backbone.out_indices}
    reasons = {name: why for name, why in report.dropped.items() if why != 'built by the model'}
    skipped = {name for name in small(kind).state_dict() if name.startswith('norm')}
    skipped = {f'backbone.{name}' for name in skipped if name.split('.')[0] not in built}
    assert reasons == dict.fromkeys(skipped, 'norm of a stage without output')
    expected = heads | {
        f'backbone.{name}': value
        for name, value in source.state_dict().items()
        if f'backbone.{name}' not in skipped
    }
    assert_same_values(model, expected)

    backbone = small(kind, seed=1)
    report = load_checkpoint(backbone, file)
    assert all(report.dropped[name] == 'not of the backbone' for name in heads)
    assert_same_values(backbone, source.state_dict())

    del file['backbone.stages.2.attns.1.proj_q.bias']
    with pytest.raises(CheckpointError, match=r'it lacks, such as backbone\.stages\.2\.attns\.1'):
        load_checkpoint(model, file)


def test_bias_tables_are_resized_bicubically_for_other_windows():
    """Windows of 7 and 12, as in fine-tuning at 384."""
    state = as_published(small(window_size=7).state_dict())
    model = small(seed=1, window_size=12)
    report = load_checkpoint(model, state)
    assert len(report.resized) == 7 and not report.fresh
    name = 'stages.2.attns.0.relative_position_bias_table'
    assert report.resized[f'backbone.{name}'] == ((169, 4), (529, 4))
    image = state[name].t().reshape(1, 4, 13, 13)
    expected = F.interpolate(image, size=(23, 23), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.state_dict()[name], expected.view(4, -1).t())


@pytest.mark.parametrize('kind', ARCHS)
def test_deformable_tables_serve_images_of_any_size(kind):
    """Kept as they are: they are read in normalised coordinates, whatever the size of the map."""
    source, model = small(kind), small(kind, seed=1)
    report = load_checkpoint(model, as_published(source.state_dict()))
    assert not report.resized
    tables = [name for name in source.state_dict() if name.endswith('rpe_table')]
    assert tables and all(
        torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in tables
    )
    for size in ((96, 96), (192, 192), (65, 130)):
        x = torch.randn(1, 3, *size)
        assert all(torch.equal(a, b) for a, b in zip(model(x), source(x), strict=True))


@pytest.mark.parametrize('kind', ARCHS)
def test_deformable_tables_keep_their_meaning_in_a_model_for_other_images(kind):
    """A larger img_size has finer tables: they are interpolated as they are read, between corners."""
    source, model = small(kind), small(kind, seed=1, img_size=192)
    report = load_checkpoint(model, as_published(source.state_dict()))
    name = 'stages.2.attns.1.rpe_table'
    assert report.resized[f'backbone.{name}'] == ((4, 11, 11), (4, 23, 23))
    assert set(report.resized) == {
        f'backbone.{name}' for name in source.state_dict() if name.endswith('rpe_table')
    }
    before, after = source.state_dict()[name], model.state_dict()[name]
    # Every entry of the finer table is what the coarser one reads at that displacement.
    axis = torch.linspace(-1, 1, 23)
    nodes = torch.stack(torch.meshgrid(axis, axis, indexing='xy'), -1).expand(4, -1, -1, -1)
    read = F.grid_sample(before[:, None], nodes, align_corners=True)[:, 0]
    torch.testing.assert_close(after, read)


def test_pretrained_init_cfg_takes_the_same_files(tmp_path):
    source = small()
    state = as_classifier(as_published(source.state_dict()))
    torch.save({'model': state, 'epoch': 299}, tmp_path / 'dat.pth')
    model = small(seed=1, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'dat.pth')))
    model.init_weights()
    name = 'stages.3.attns.1.conv_offset.3.weight'
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])


def test_stages_that_are_not_built_are_dropped():
    state = as_published(small().state_dict(), buffers=False)
    report = load_checkpoint(small(seed=1, out_indices=(0, 1)), state)
    assert not report.fresh
    stages = {'.'.join(name.split('.')[1:3]) for name in report.dropped}
    # The way down to stage 2 belongs to it.
    assert stages == {
        *('stages.2', 'stages.3', 'down_projs.1', 'down_projs.2'),
        *(f'norm{i}.{part}' for i in (2, 3) for part in ('weight', 'bias')),
    }


@pytest.mark.parametrize('kind', ARCHS)
def test_own_file_is_read_again(kind):
    backbone, twin = small(kind, out_indices=(1, 3)), small(kind, seed=1, out_indices=(1, 3))
    report = load_checkpoint(twin, backbone.state_dict())
    assert not report.fresh and not report.dropped and not report.resized
    assert_same_values(twin, backbone.state_dict())


def test_a_file_of_the_other_generation_does_not_fit():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'published dat backbone .* does not fit'):
        load_checkpoint(model, as_published(small('DAT++').state_dict()))
    with pytest.raises(CheckpointError, match='is no dat'):
        load_checkpoint(model, {'stages.0.blocks.0.attn.qkv.weight': torch.zeros(3)})
    assert_same_values(model, before)
