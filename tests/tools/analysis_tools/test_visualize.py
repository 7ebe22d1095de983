"""visualize.py from config and checkpoint to pictures and a page, for all tasks and families."""

import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmattn.visualization import Subject

ROOT = Path(__file__).parents[3]
COCO = ROOT.parent / 'shared/data/coco_tiny/val2017'

DETECTOR = """
_base_ = '{root}/configs/gcvit/demo_cascade_mask_rcnn_gcvit.py'
model = _base_.model
model.backbone.arch = dict(embed_dims=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), mlp_ratio=1)
model.test_cfg.rpn.update(nms_pre=50, max_per_img=10)
model.test_cfg.rcnn.max_per_img = 3
"""
SEGMENTOR = """
_base_ = '{root}/configs/quadtree/fpn_quadtree_b0_ade20k.py'
arch = dict(embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch)),
    neck=dict(in_channels=[16, 32, 40, 64], out_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=32),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
CLASSIFIER = """
_base_ = '{root}/configs/dat/dat_t_imagenet.py'
arch = dict(
    dims=(16, 32, 64, 64), blocks=('L', 'LS', 'LD', 'D'),
    num_heads=(1, 2, 4, 4), groups=(0, 0, 2, 4),
)
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch), img_size=64),
    head=dict(in_channels=64, num_classes=10),
)
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
SWIN = """
default_scope = 'mmdet'
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs'),
]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=pipeline))
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127] * 3, std=[60] * 3, pad_size_divisor=32
    ),
    backbone=dict(
        type='SwinTransformer', embed_dims=16, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2),
        window_size=4,
    ),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
    test_cfg=dict(
        nms_pre=10, score_thr=0.9, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5
    ),
)
"""


@pytest.fixture
def tool(monkeypatch):
    for name in ('MMATTN_COCO', 'MMATTN_ADE20K', 'MMATTN_IMAGENET'):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        path = ROOT / 'tools/analysis_tools/visualize.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name='__main__')

    return run


@pytest.fixture
def setting(tmp_path):
    """A config file, a checkpoint with fresh weights, and a data root that does not exist."""

    def make(text):
        path = tmp_path / 'config.py'
        path.write_text(text.replace('{root}', str(ROOT)))
        torch.manual_seed(0)
        torch.save(Subject(path).model.state_dict(), tmp_path / 'model.pth')
        return path, tmp_path / 'model.pth'

    return make


@pytest.fixture
def images(tmp_path):
    """Two photographs if there are some, or else generated images, of different sizes."""
    photographs = sorted(COCO.glob('*.jpg'))[:2]
    if photographs:
        return photographs
    rng = np.random.default_rng(0)
    paths = [tmp_path / 'one.png', tmp_path / 'two.jpg']
    for path, size in zip(paths, ((75, 100), (120, 90)), strict=True):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), size[::-1])
        cv2.imwrite(str(path), image)
    return paths


def check(out, images, names):
    """Assert that each image has these pictures, not blank; return the page's data."""
    for image in images:
        assert {path.stem for path in (out / image.stem).glob('*.png')} == names
        for path in (out / image.stem).glob('*.png'):
            picture = cv2.imread(str(path))
            assert picture.std() > 10 and min(picture.shape[:2]) > 150, path
    page = (out / 'index.html').read_text()
    data = json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page, re.S)[1])
    assert [image['name'] for image in data['images']] == [image.name for image in images]
    return data


def test_detector_with_gcvit(tool, setting, images, tmp_path, capsys):
    out = tmp_path / 'pictures'
    tool(
        *setting(DETECTOR),
        *images,
        '--out',
        out,
        '--score-thr',
        0,
        '--query',
        '10,20',
        '--stage',
        1,
    )
    always = {'prediction', 'grad_cam', 'receptive_field', 'features'}
    data = check(out, images, always | {'attention_local', 'attention_global', 'window_0'})
    assert {path.stem for path in out.glob('sheet_*.png')} == {
        f'sheet_{name}' for name in always | {'attention_local', 'attention_global', 'window_0'}
    }
    assert len(data['images'][0]['boxes']) == 3
    said = capsys.readouterr()
    assert f'14 pictures of 2 images in {out}' in said.out
    assert (
        "No ground truth beside the predictions: the config's test data cannot be read" in said.out
    )


def test_segmentor_with_quadtree(tool, setting, images, tmp_path):
    out = tmp_path / 'pictures'
    tool(*setting(SEGMENTOR), images[0], '--out', out, '--pair', images[1], '--class', 'sky')
    names = {'prediction', 'grad_cam', 'receptive_field', 'features', 'kept_0', 'kept_between_0'}
    data = check(out, images[:1], names)
    assert [layer['kind'] for layer in data['images'][0]['layers']] == ['quadtree'] * 4


def test_classifier_with_dat_beside_swin(tool, setting, images, tmp_path):
    out, swin = tmp_path / 'pictures', tmp_path / 'swin.py'
    swin.write_text(SWIN)
    tool(*setting(CLASSIFIER), images[0], '--out', out, '--swin', swin, '--stage', 2)
    names = {'prediction', 'grad_cam', 'receptive_field', 'features', 'sampling_points', 'keys_0'}
    check(out, images[:1], names | {'attention_local'})


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['none.jpg'], r'there is no image none\.jpg'),
        (['{image}', '--query', '5000,3'], 'a query must lie in the image of .* got y 5000, x 3'),
        (
            ['{image}', '--stage', '4'],
            'no block of any attention in stage 4; there is stage 0: local',
        ),
        (['{image}', '--head', '9'], r'there is no head 9; there is stage 0: local \(1 head\)'),
        (
            ['{image}', '--class', 'unicorn'],
            r'the model has no class unicorn; it has 1000 \(0 to 999\), such as \w+',
        ),
        (['{config}'], r'config\.py is no image that can be read'),
    ],
)
def test_bad_input_is_named_with_what_there_is(
    tool, setting, images, tmp_path, capsys, arguments, sentence
):
    config, checkpoint = setting(CLASSIFIER)
    arguments = [a.format(image=images[0], config=config) for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        tool(config, checkpoint, *arguments, '--out', tmp_path / 'pictures')
    assert stopped.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / 'pictures').exists()


def test_contact_sheet(load_tool, tmp_path):
    def save(name, height, width, value):
        (tmp_path / name).mkdir(exist_ok=True)
        path = tmp_path / name / 'kept.png'
        Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
        return path

    tool = load_tool('analysis_tools/visualize')
    narrow = [save('one', 60, 90, 0), save('two', 90, 60, 200), save('three', 60, 90, 0)]
    sheet = np.asarray(tool.contact_sheet(narrow))
    assert sheet.shape == (30 + 1125 + 30 + 500, 1500, 3)
    np.testing.assert_array_equal(sheet[100, 760:1400], 200)
    assert sheet[:30, :750].min() < 100, 'its name'
    wide = [save('four', 10, 30, 0), save('five', 10, 30, 0)]
    assert tool.contact_sheet(wide).size == (1500, 2 * 530)
