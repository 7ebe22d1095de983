"""Published files of every family and kind, loaded into models of our configs."""

import re
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from helpers import golden, published

from mmattn.checkpoint import load_checkpoint

INDEX = r'.*(relative_position_index|attn_mask)'


# ------------------------------------------------------------------------- the published names


@pytest.mark.parametrize(
    'config, file, case',
    [
        ('gcvit/gcvit_xxt_imagenet', published.classifier_file, 'gcvit_xxt_cls_224'),
        ('gcvit/gcvit_s_imagenet', published.classifier_file, 'gcvit_s_cls'),
        ('gcvit/gcvit_xxt_imagenet', published.timm_file, 'timm_gcvit_xxt_cls_224'),
        ('gcvit/gcvit_s_imagenet', published.timm_file, 'timm_gcvit_s_cls'),
        ('gcvit/mask_rcnn_gcvit_t_coco', published.model_file, 'gcvit_t_det_256x320'),
        ('dat/dat_t_imagenet', published.classifier_file, 'dat_t_cls_224'),
        ('dat/dat_tpp_imagenet', published.classifier_file, 'datpp_t_cls_224'),
        ('dat/mask_rcnn_dat_tpp_1x_coco', published.model_file, 'datpp_t_det_200x333'),
        ('quadtree/quadtree_b1_imagenet', published.classifier_file, 'quadtree_b1_cls_224'),
        ('quadtree/mask_rcnn_quadtree_b1_1x_coco', published.model_file, 'quadtree_b1_det_256x320'),
    ],
)
def test_the_files_made_here_have_the_published_names_and_shapes(config, file, case):
    with torch.device('meta'):
        state = file(published.build(config), config.split('/')[0])
    if file is published.model_file:
        state = {k[9:]: v for k, v in state.items() if k.startswith('backbone.')}
    shapes = golden.shapes(case)
    assert state.keys() == shapes.keys()
    for name, value in state.items():
        # DAT's buffers have sizes that fit nothing.
        if not (config.startswith('dat') and re.match(INDEX, name)):
            assert list(value.shape) == shapes[name], name


# -------------------------------------------------------------------------- the golden outputs


@pytest.mark.parametrize(
    'config, case',
    [
        ('gcvit/gcvit_xxt_imagenet', 'gcvit_xxt_cls_224'),
        ('gcvit/gcvit_xxt_imagenet', 'timm_gcvit_xxt_cls_224'),
        ('dat/dat_t_imagenet', 'dat_t_cls_224'),
        ('dat/dat_tpp_imagenet', 'datpp_t_cls_224'),
        ('quadtree/quadtree_b1_imagenet', 'quadtree_b1_cls_224'),
    ],
)
def test_classifier_files_give_the_published_logits(config, case, tmp_path):
    model = published.build(config).double().eval()
    state = golden.state_dict(case.removeprefix('timm_'))
    if case.startswith('timm_'):
        state = published.timm_names(state)
    torch.save({'state_dict': state}, tmp_path / 'published.pth.tar')
    report = load_checkpoint(model, tmp_path / 'published.pth.tar')
    assert not report.resized and not report.dropped and not report.fresh
    case = golden.Case(case.removeprefix('timm_'))
    with torch.no_grad():
        assert case.output_error('logits', model(case.image)) < 1e-9


@pytest.mark.parametrize(
    'config, case, options',
    [
        ('gcvit/mask_rcnn_gcvit_t_coco', 'gcvit_t_det_256x320', {}),
        ('dat/mask_rcnn_dat_tpp_1x_coco', 'datpp_t_det_200x333', {}),
        ('quadtree/mask_rcnn_quadtree_b1_1x_coco', 'quadtree_b1_det_256x320', dict(topks=8)),
        (
            'quadtree/mask_rcnn_quadtree_b0_1x_coco',
            'quadtree_a_b0_det_224',
            dict(topks=8, attn_type='A'),
        ),
    ],
)
def test_detector_files_give_the_published_maps(config, case, options, tmp_path):
    model = published.build(config, **options).double().eval()
    state = published.golden_model_file(model, case)
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'published.pth')
    report = load_checkpoint(model, tmp_path / 'published.pth')
    assert not report.resized and not report.dropped and not report.fresh
    case = golden.Case(case)
    with torch.no_grad():
        maps = model.backbone(case.image)
    for name, output in zip(case.output_names, maps, strict=True):
        assert case.output_error(name, output) < 1e-9


# ----------------------------------------------------------- every kind of file and container

CLASSIFIER = published.classifier_file
TIMM = published.timm_file
MODEL = published.model_file
OWN = published.own_file
ALWAYS = ['bare', 'state_dict', 'model', 'module.', 'mmengine']
TRAINED = ["timm's training", 'state_dict_ema', 'model_ema', "Swin's training", 'torch before 1.6']
MMDET = ['mmdet 2', 'mmengine']
B = 'dat/dat_b_384_imagenet'


@dataclass
class Kind:
    name: str
    config: str
    file: callable
    containers: list
    changes: dict = field(default_factory=dict)

    @property
    def has_buffers(self):
        """Index buffers are in files of GC ViT and of DAT, not of DAT++, which has no windows."""
        return self.file not in (TIMM, OWN) and (
            self.config.startswith('gcvit')
            or re.match(r'dat/.*dat_[tsb]_', self.config) is not None
        )


KINDS = [
    Kind('classifier', 'gcvit/gcvit_t_imagenet', CLASSIFIER, ALWAYS + TRAINED),
    Kind('21K classifier', 'gcvit/gcvit_l_imagenet', CLASSIFIER, ALWAYS, dict(num_classes=21841)),
    Kind('384', 'gcvit/gcvit_l_384_imagenet', CLASSIFIER, ALWAYS),
    Kind('512', 'gcvit/gcvit_l_512_imagenet', CLASSIFIER, ALWAYS),
    Kind('timm', 'gcvit/gcvit_xxt_imagenet', TIMM, [*ALWAYS, 'safetensors']),
    Kind('Mask R-CNN', 'gcvit/mask_rcnn_gcvit_t_coco', MODEL, MMDET),
    Kind('Cascade Mask R-CNN', 'gcvit/cascade_mask_rcnn_gcvit_s_coco', MODEL, MMDET),
    Kind('DINO', 'gcvit/dino_gcvit_l_coco', MODEL, MMDET),
    Kind('UPerNet', 'gcvit/upernet_gcvit_b_ade20k', MODEL, MMDET),
    Kind('classifier', 'dat/dat_t_imagenet', CLASSIFIER, ALWAYS + TRAINED),
    Kind('384', 'dat/dat_b_384_imagenet', CLASSIFIER, ALWAYS),
    Kind('classifier', 'dat/dat_tpp_imagenet', CLASSIFIER, ALWAYS + TRAINED),
    Kind('384', 'dat/dat_bpp_384_imagenet', CLASSIFIER, ALWAYS),
    Kind('RetinaNet', 'dat/retinanet_dat_s_3x_coco', MODEL, MMDET),
    Kind('Mask R-CNN', 'dat/mask_rcnn_dat_tpp_1x_coco', MODEL, MMDET),
    Kind('Cascade Mask R-CNN', 'dat/cascade_mask_rcnn_dat_tpp_1x_coco', MODEL, MMDET),
    Kind('UPerNet', 'dat/upernet_dat_t_ade20k', MODEL, MMDET),
    Kind('Semantic FPN', 'dat/fpn_dat_tpp_ade20k', MODEL, MMDET),
    Kind('classifier', 'quadtree/quadtree_b2_imagenet', CLASSIFIER, ALWAYS + TRAINED),
    Kind(
        'type A', 'quadtree/quadtree_b2_imagenet', CLASSIFIER, ALWAYS, dict(attn_type='A')
    ),
    Kind('RetinaNet', 'quadtree/retinanet_quadtree_b2_1x_coco', MODEL, MMDET),
    Kind('Mask R-CNN', 'quadtree/mask_rcnn_quadtree_b2_1x_coco', MODEL, MMDET),
    Kind('Semantic FPN', 'quadtree/fpn_quadtree_b2_ade20k', MODEL, MMDET),
    Kind('own classifier', 'gcvit/gcvit_t_imagenet', OWN, ['mmengine', 'safetensors']),
    Kind('own detector', 'dat/mask_rcnn_dat_tpp_1x_coco', OWN, ['mmengine']),
    Kind('own classifier', 'dat/dat_t_imagenet', OWN, ['mmengine']),
    Kind('own segmentor', 'quadtree/fpn_quadtree_b2_ade20k', OWN, ['mmengine']),
]  # fmt: skip


@cache
def model_of(config, **changes):
    return published.build(config, 'small', **changes)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_values(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    'kind, container',
    [
        pytest.param(kind, container, id=f'{kind.config.split("/")[0]} {kind.name}, {container}')
        for kind in KINDS
        for container in kind.containers
    ],
)
def test_a_file_gives_back_the_model_that_it_was_made_from(kind, container, tmp_path):
    family = kind.config.split('/')[0]
    model = published.fill(model_of(kind.config, **kind.changes), seed=1)
    expected = copied(model)
    state = {name: value.clone() for name, value in kind.file(model, family).items()}
    published.CONTAINERS[container](state, tmp_path / 'published.pth')

    published.fill(model, seed=2)
    report = load_checkpoint(model, tmp_path / 'published.pth')
    assert_same_values(model, expected)
    author = {TIMM: 'timm', OWN: 'mmattn'}.get(kind.file, 'published')
    what = 'classifier' if kind.config.endswith('_imagenet') else 'model'
    assert report.format == f'{author} {family} {what}'
    assert sorted(report.loaded) == sorted(expected)
    assert report.resized == {} and report.fresh == []
    buffers = {
        re.sub(r'attns\.(\d+)', r'blocks.\1.attn', name.removeprefix('backbone.')).replace(
            'levels.', 'stages.'
        )
        for name in state
        if re.fullmatch(INDEX, name)
    }
    assert report.dropped == {f'backbone.{name}': 'built by the model' for name in buffers}
    assert bool(buffers) == kind.has_buffers


# -------------------------------------------------------------------- real depths and windows


@pytest.mark.parametrize(
    'config, file',
    [
        ('gcvit/gcvit_s2_imagenet', CLASSIFIER),
        ('gcvit/gcvit_l_512_imagenet', CLASSIFIER),
        ('gcvit/gcvit_t2_imagenet', TIMM),
        ('gcvit/dino_gcvit_l_coco', MODEL),
        ('dat/dat_b_384_imagenet', CLASSIFIER),
        ('dat/dat_bpp_384_imagenet', CLASSIFIER),
        ('dat/cascade_mask_rcnn_dat_bpp_3x_coco', MODEL),
        ('quadtree/quadtree_b4_imagenet', CLASSIFIER),
        ('quadtree/fpn_quadtree_b4_ade20k', MODEL),
    ],
)
def test_files_of_the_large_variants_fit_the_configs(config, file):
    """Compare names and shapes, on the meta device."""
    with torch.device('meta'):
        model = published.build(config)
        report = load_checkpoint(model, file(model, config.split('/')[0]))
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert not report.resized and not report.fresh
    assert set(report.dropped.values()) <= {'built by the model'}


# -------------------------------------------------------- another task, size or set of classes

TABLE = r'.*relative_position_bias_table'
RPE = r'.*position_bias\.table'
NORMS = r'backbone\.norm\d\..*'
HEADS = r'(?!backbone\.).*'
BOX = r'.*(fc_cls|fc_reg|retina_cls|conv_logits)\..*'
SEG = r'.*conv_seg\..*'
TOP = {
    'gcvit': {
        r'head\.fc\..*': "the classifier's head",
        r'backbone\.norm3\..*': "the classifier's norm",
    },
    'quadtree': {r'head\.fc\..*': "the classifier's head"},
}
TOP['dat'] = TOP['gcvit']
OTHER, ELSEWHERE = 'has other classes', 'not of the backbone'


@dataclass
class Use:
    """A file of one config loaded into the model of another; patterns of names by outcome."""

    what: str
    config: str
    target: str | None  # None: the bare backbone
    fresh: str | None = None
    resized: str | None = None
    dropped: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    target_changes: dict = field(default_factory=dict)


USES = [
    Use('classifier in a detector', 'gcvit/gcvit_t_imagenet', 'gcvit/mask_rcnn_gcvit_t_coco',
        fresh=f'{NORMS}|{HEADS}', resized=TABLE, dropped=TOP['gcvit']),
    Use('classifier in a segmentor', 'dat/dat_t_imagenet', 'dat/upernet_dat_t_ade20k',
        fresh=f'{NORMS}|{HEADS}', dropped=TOP['dat']),
    Use('classifier in a segmentor', 'dat/dat_tpp_imagenet', 'dat/fpn_dat_tpp_ade20k',
        fresh=f'{NORMS}|{HEADS}', dropped=TOP['dat']),
    Use('classifier in a detector', 'quadtree/quadtree_b2_imagenet',
        'quadtree/retinanet_quadtree_b2_1x_coco', fresh=HEADS, dropped=TOP['quadtree']),
    Use('classifier in a backbone', 'gcvit/gcvit_t_imagenet', None, dropped=TOP['gcvit'],
        fresh=NORMS),
    Use('classifier in a backbone', 'dat/dat_t_imagenet', None, dropped=TOP['dat'], fresh=NORMS),
    Use('classifier in a backbone', 'quadtree/quadtree_b2_imagenet', None, dropped=TOP['quadtree']),
    Use('224 at 384', 'gcvit/gcvit_l_imagenet', 'gcvit/gcvit_l_384_imagenet', resized=TABLE),
    Use('384 at 224', 'gcvit/gcvit_l_384_imagenet', 'gcvit/gcvit_l_imagenet', resized=TABLE),
    Use('224 at 384', 'dat/dat_b_imagenet', B, resized=f'{TABLE}|{RPE}'),
    Use('384 at 224', B, 'dat/dat_b_imagenet', resized=f'{TABLE}|{RPE}'),
    Use('224 at 384', 'dat/dat_bpp_imagenet', 'dat/dat_bpp_384_imagenet'),  # one table for both
    Use("table of another size", 'dat/dat_bpp_imagenet', 'dat/dat_bpp_imagenet', resized=RPE,
        target_changes=dict(img_size=384)),
    Use('21K at 384 for 1000 classes', 'gcvit/gcvit_l_imagenet', 'gcvit/gcvit_l_384_imagenet',
        resized=TABLE, fresh=r'head\.fc\..*', dropped={r'head\.fc\..*': OTHER},
        changes=dict(num_classes=21841)),
    *(Use('1000 classes for 10', config, config, fresh=r'head\.fc\..*',
          dropped={r'head\.fc\..*': OTHER}, target_changes=dict(num_classes=10))
      for config in ('gcvit/gcvit_t_imagenet', 'dat/dat_tpp_imagenet',
                     'quadtree/quadtree_b2_imagenet')),
    *(Use('80 classes for 5', config, config, fresh=BOX, dropped={BOX: OTHER},
          target_changes=dict(num_classes=5))
      for config in ('gcvit/cascade_mask_rcnn_gcvit_s_coco', 'dat/retinanet_dat_s_3x_coco',
                     'quadtree/mask_rcnn_quadtree_b2_1x_coco')),
    *(Use('150 classes for 19', config, config, fresh=SEG, dropped={SEG: OTHER},
          target_changes=dict(num_classes=19))
      for config in ('gcvit/upernet_gcvit_b_ade20k', 'dat/fpn_dat_tpp_ade20k',
                     'quadtree/fpn_quadtree_b2_ade20k')),
    *(Use('detector in a backbone', config, None, dropped={HEADS: ELSEWHERE})
      for config in ('gcvit/mask_rcnn_gcvit_t_coco', 'dat/mask_rcnn_dat_tpp_1x_coco',
                     'quadtree/retinanet_quadtree_b2_1x_coco')),
    *(Use('four outputs in three', config, None, target_changes=dict(out_indices=(1, 2, 3)),
          dropped={HEADS: ELSEWHERE, r'backbone\.norm0\..*': 'norm of a stage without output'})
      for config in ('gcvit/mask_rcnn_gcvit_t_coco', 'dat/mask_rcnn_dat_tpp_1x_coco')),
    *(Use('four stages in two', config, None, target_changes=dict(out_indices=(0, 1)),
          dropped={HEADS: ELSEWHERE, NORMS: 'norm of a stage without output',
                   r'.*': 'of a stage that is not built'})
      for config in ('gcvit/mask_rcnn_gcvit_t_coco', 'dat/mask_rcnn_dat_tpp_1x_coco')),
    Use('four stages in two', 'quadtree/retinanet_quadtree_b2_1x_coco', None,
        target_changes=dict(out_indices=(0, 1)),
        dropped={HEADS: ELSEWHERE, r'.*': 'of a stage that is not built'}),
]  # fmt: skip


def matching(pattern, names):
    return {name for name in names if pattern and re.fullmatch(pattern, name)}


@pytest.mark.parametrize(
    'use', [pytest.param(use, id=f'{use.config.split("/")[0]} {use.what}') for use in USES]
)
def test_files_for_another_use(use):
    """Loading is strict, and the report lists tensors that were resized, fresh or dropped."""
    family = use.config.split('/')[0]
    source = published.fill(model_of(use.config, **use.changes), seed=1)
    values = copied(source)
    make = CLASSIFIER if use.config.endswith('_imagenet') else MODEL
    state = {name: value.clone() for name, value in make(source, family).items()}
    if use.target is None:
        options = dict(out_indices=(0, 1, 2, 3)) | use.target_changes
        model = model_of(use.config, **options).backbone
        target = published.bare(model)
    else:
        model = target = model_of(use.target, **use.target_changes)
    before = copied(published.fill(target, seed=2))

    report = load_checkpoint(model, state)
    after, names = target.state_dict(), set(before)
    fresh, resized = matching(use.fresh, names), matching(use.resized, names)
    assert bool(fresh) == bool(use.fresh) and bool(resized) == bool(use.resized)
    assert set(report.fresh) == fresh
    assert set(report.resized) == resized
    assert set(report.loaded) == names - fresh - resized
    assert [n for n in report.loaded if not torch.equal(after[n], values[n])] == []
    assert [n for n in report.fresh if not torch.equal(after[n], before[n])] == []
    for name, shapes in report.resized.items():
        assert shapes == (values[name].shape, after[name].shape) and shapes[0] != shapes[1]
        assert not torch.equal(after[name], before[name])

    dropped = {}
    for name in values.keys() - set(report.loaded) - resized:
        dropped[name] = next(
            why for pattern, why in use.dropped.items() if matching(pattern, [name])
        )
    said = {name: why for name, why in report.dropped.items() if why != 'built by the model'}
    assert said.keys() == dropped.keys()
    assert [name for name, why in said.items() if not why.startswith(dropped[name])] == []
    assert set(dropped.values()) == set(use.dropped.values())
