"""Grad-CAM of a detection goes through all heads of a detector."""

import cv2
import numpy as np
import pytest
import torch

from mmattn.visualization import Subject, grad_cam
from mmattn.visualization.cam import class_score, detection_score

RETINANET = """
default_scope = 'mmdet'
custom_imports = dict(imports=['mmattn'])
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=pipeline))
arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), mlp_ratio=1)
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127] * 3, std=[60] * 3, pad_size_divisor=32),
    backbone=dict(type='GCViT', arch=arch, window_size=(4, 4, 4, 4)),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, start_level=1, num_outs=4),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
    test_cfg=dict(nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5),
)
"""


@pytest.fixture
def seen(tmp_path):
    (tmp_path / 'config.py').write_text(RETINANET)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    torch.manual_seed(0)
    subject = Subject(tmp_path / 'config.py')
    return subject, subject.look(tmp_path / 'image.png')


def test_a_dense_detector_is_explained_by_its_strongest_anchor(seen):
    subject, view = seen
    cams = grad_cam(subject.model, view.inputs, detection_score(subject, view, 0))

    def strongest(inputs):
        maps, _ = subject.model(inputs, view.samples, mode='tensor')
        return torch.stack([scores.sigmoid().max() for scores in maps]).max()[None]

    assert view.prediction.scores[0] == pytest.approx(float(strongest(view.inputs)), rel=1e-4)
    expected = grad_cam(subject.model, view.inputs, strongest)
    assert [cam.shape for cam in cams] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert not cams[0].any(), 'the neck leaves out the finest map'
    assert max(cam.max() for cam in cams) > 0
    for cam, wanted in zip(cams, expected, strict=True):
        np.testing.assert_allclose(cam, wanted, rtol=1e-3, atol=1e-9)


def test_what_is_not_there_is_an_error(seen):
    subject, view = seen
    with pytest.raises(ValueError, match='there are 5 detections, 0 to 4, got 5'):
        detection_score(subject, view, 5)
    with pytest.raises(ValueError, match='the model has the classes 0 to 79 '):
        class_score(subject, view, 80)
