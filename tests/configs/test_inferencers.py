"""Inferencers of mmdet, mmseg and mmpretrain with our configs and local checkpoints."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import golden, published
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint as mmengine_load

import mmattn  # noqa: F401  registers the backbones
from mmattn.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
PHOTOGRAPHS = ROOT.parent / 'shared/data/coco_tiny/val2017'

LOAD = """test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 128), keep_ratio=True),
   """
# The smallest of the family, on small images; the last step depends on the task.
DETECTOR = f"""
_base_ = '{CONFIGS}/gcvit/mask_rcnn_gcvit_t_coco.py'
model = dict(
    backbone=dict(arch='xxtiny'),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
{LOAD} dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
SEGMENTOR = f"""
_base_ = '{CONFIGS}/gcvit/upernet_gcvit_t_ade20k.py'
model = dict(
    backbone=dict(arch='xxtiny'), decode_head=dict(channels=32), auxiliary_head=dict(channels=32)
)
{LOAD} dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
CLASSIFIER = CONFIGS / 'gcvit/gcvit_xxt_imagenet.py'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Paths of a generated image, and of a photograph if there is one."""
    path = tmp_path_factory.mktemp('image') / 'drawn.jpg'
    picture = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    cv2.rectangle(picture, (30, 20), (90, 100), (255, 40, 0), -1)
    cv2.imwrite(str(path), picture)
    return [str(path), *map(str, sorted(PHOTOGRAPHS.glob('*.jpg'))[:1])]


# A checkpoint as training writes it, and one of the authors' (mmdet 2, mmseg 0.x).
files = pytest.mark.parametrize('file', [published.own_file, published.model_file])


def saved(text, file, folder, **dataset_meta):
    """Config file, checkpoint file and the model that it was made from."""
    path, checkpoint = folder / 'small.py', folder / 'epoch_1.pth'
    path.write_text(text)
    model = build(path)  # with initial weights: those of published.fill() detect nothing
    state = file(model, 'gcvit')
    assert (file is published.own_file) == (state.keys() == model.state_dict().keys())
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=dataset_meta)), checkpoint)
    return str(path), str(checkpoint), model


def build(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model).eval()


def assert_same_weights(model, expected):
    found = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


@files
def test_detector(file, images, tmp_path):
    from mmdet.apis import DetInferencer

    classes = [f'class {i}' for i in range(80)]
    config, checkpoint, model = saved(DETECTOR, file, tmp_path, classes=classes)
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    assert_same_weights(inferencer.model, model)
    out = tmp_path / 'out'
    found = inferencer(images, out_dir=str(out), pred_score_thr=0)['predictions']
    for image, objects in zip(images, found, strict=True):
        assert len(objects['labels']) == len(objects['bboxes']) == len(objects['masks']) == 5
        height, width = cv2.imread(image).shape[:2]
        for left, top, right, bottom in objects['bboxes']:
            assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
        assert cv2.imread(str(out / 'vis' / Path(image).name)).shape[:2] == (height, width)


@files
def test_segmentor(file, images, tmp_path):
    from mmseg.apis import MMSegInferencer

    config, checkpoint, model = saved(SEGMENTOR, file, tmp_path, classes=None, palette=None)
    # Without the data set's name, it draws with the 19 colors of Cityscapes.
    options = dict(dataset_name='ade20k', device='cpu')
    inferencer = MMSegInferencer(config, checkpoint, **options)
    assert_same_weights(inferencer.model, model)
    found = inferencer(images, out_dir=str(tmp_path / 'out'))['predictions']
    found = found if len(images) > 1 else [found]  # mmseg returns a single map without a list
    for image, classes in zip(images, found, strict=True):
        assert classes.shape == cv2.imread(image).shape[:2]
        assert 0 <= classes.min() <= classes.max() < 150
        assert (tmp_path / 'out/vis' / Path(image).name).exists()


@pytest.mark.parametrize(
    'config',
    [
        'gcvit/cascade_mask_rcnn_gcvit_t_coco',
        'gcvit/upernet_gcvit_t_ade20k',
        'dat/retinanet_dat_t_1x_coco',
        'dat/mask_rcnn_dat_tpp_1x_coco',
        'dat/fpn_dat_tpp_ade20k',
        'quadtree/mask_rcnn_quadtree_b1_1x_coco',
        'quadtree/fpn_quadtree_b1_ade20k',
    ],
)
def test_load_from_and_stock_test_take_published_files(config, tmp_path):
    """By the function of mmengine that ``load_from``, stock test.py and init_detector call."""
    source = published.fill(published.build(config, 'small'), seed=1)
    state = published.model_file(source, config.split('/')[0])
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'published.pth')
    model = published.fill(published.build(config, 'small'), seed=2)
    mmengine_load(model, str(tmp_path / 'published.pth'), map_location='cpu', strict=True)
    assert_same_weights(model, source)


def test_stock_models_start_from_a_published_classifier(tmp_path):
    """By ``init_cfg``, as mmpretrain's configs write it."""
    torch.save(golden.state_dict('gcvit_xxt_cls_224'), tmp_path / 'published.pth.tar')
    cfg = Config.fromfile(CLASSIFIER)
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'published.pth.tar')
    )
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    expected = build(CLASSIFIER)
    load_checkpoint(expected, golden.state_dict('gcvit_xxt_cls_224'))
    for name, value in expected.backbone.state_dict().items():
        assert name.startswith('norm3') or torch.equal(model.backbone.state_dict()[name], value)


def test_classifier_with_published_weights_after_conversion(images, tmp_path, monkeypatch):
    from mmpretrain import ImageClassificationInferencer

    state = golden.state_dict('gcvit_xxt_cls_224')
    torch.save(dict(state_dict=state), tmp_path / 'published.pth.tar')
    own = tmp_path / 'own.pth'
    monkeypatch.setattr('sys.argv', ['convert', str(tmp_path / 'published.pth.tar'), str(own)])
    runpy.run_path(str(ROOT / 'tools/model_converters/convert_checkpoint.py'), run_name='__main__')

    inferencer = ImageClassificationInferencer(str(CLASSIFIER), pretrained=str(own), device='cpu')
    expected = build(CLASSIFIER)
    load_checkpoint(expected, state)
    assert_same_weights(inferencer.model, expected)
    for found in inferencer(images):
        assert found['pred_scores'].sum() == pytest.approx(1, abs=1e-5)
        assert found['pred_score'] == found['pred_scores'].max()
