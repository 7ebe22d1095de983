"""Grad-CAM, effective receptive fields and principal components, against known results."""

import cv2
import numpy as np
import pytest
import torch
from helpers.small_backbones import small_backbone

from mmattn.visualization import (
    Subject,
    capture,
    effective_receptive_field,
    feature_pca,
    grad_cam,
)
from mmattn.visualization.explain import class_score, detection_score, enclosing_side

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
RETINANET = """
default_scope = 'mmdet'
custom_imports = dict(imports=['mmattn'])
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')
]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=pipeline))
arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), mlp_ratio=1)
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127] * 3, std=[60] * 3, pad_size_divisor=32
    ),
    backbone=dict(type='GCViT', arch=arch, window_size=(4, 4, 4, 4)),
    neck=dict(
        type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, start_level=1, num_outs=4
    ),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16, 32, 64]
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
    test_cfg=dict(
        nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5
    ),
)
"""


@pytest.fixture
def viewed(tmp_path):
    (tmp_path / 'config.py').write_text(RETINANET)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    torch.manual_seed(0)
    subject = Subject(tmp_path / 'config.py')
    return subject, subject.look(tmp_path / 'image.png')


def test_dense_detector_is_explained_by_its_strongest_anchor(viewed):
    subject, view = viewed
    cams = grad_cam(subject.model, view.inputs, detection_score(subject, view, 0))

    def strongest(inputs):
        maps, _ = subject.model(inputs, view.samples, mode='tensor')
        return torch.stack([scores.sigmoid().max() for scores in maps]).max()[None]

    assert view.prediction.scores[0] == pytest.approx(float(strongest(view.inputs)), rel=1e-4)
    expected = grad_cam(subject.model, view.inputs, strongest)
    assert [cam.shape for cam in cams] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert not cams[0].any(), 'the neck does not use the finest map'
    assert max(cam.max() for cam in cams) > 0
    for cam, wanted in zip(cams, expected, strict=True):
        np.testing.assert_allclose(cam, wanted, rtol=1e-3, atol=1e-9)


def test_unknown_detection_or_class_is_an_error(viewed):
    subject, view = viewed
    with pytest.raises(ValueError, match='there are 5 detections, 0 to 4, got 5'):
        detection_score(subject, view, 5)
    with pytest.raises(ValueError, match='the model has the classes 0 to 79 '):
        class_score(subject, view, 80)


def test_grad_cam_of_a_channel_mean_is_the_channel():
    model = small_backbone('dat')
    with capture(model) as seen, torch.no_grad():
        model(IMAGE)
    cams = grad_cam(model, IMAGE, lambda x: model(x)[2][:, 5].mean((1, 2)))
    assert [cam.shape for cam in cams] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    channel = seen.features[2][0, 5].numpy().clip(0)
    np.testing.assert_allclose(cams[2] * 16, channel, rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for unused in (0, 1, 3):  # maps that the score does not use
        assert not cams[unused].any()


def test_receptive_fields_grow_from_the_center_window():
    model = small_backbone('dat')
    fields = effective_receptive_field(model, torch.randn(1, 3, 128, 128))
    assert [field.shape for field in fields] == [(128, 128)] * 4
    np.testing.assert_allclose([field.sum() for field in fields], 1, rtol=1e-5)
    # Patches of 4 pixels in windows of 4 tokens: only the window of the center token.
    window = np.zeros((128, 128), bool)
    window[64:80, 64:80] = True
    assert fields[0][window].min() > 0 and not fields[0][~window].any()
    reach = [(field > 0).mean() for field in fields]
    assert reach[0] < reach[1] < reach[2] <= reach[3]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_enclosing_side_of_a_square():
    field = np.zeros((21, 31))
    field[8:13, 10:15] = 1
    assert enclosing_side(field, 0.99) == 5
    assert enclosing_side(field, 0.3) == 3
    assert enclosing_side(field, 0.01) == 1


def test_principal_components_are_the_planted_ones():
    rng = np.random.default_rng(0)
    planted = np.zeros((3, 4, 4))
    planted[0, :2], planted[1, :, :2], planted[2, ::2] = 9, 5, 2
    directions = np.linalg.qr(rng.standard_normal((12, 3)))[0]
    features = torch.tensor(np.einsum('cd,dyx->cyx', directions, planted))[None]
    colors, variance = feature_pca(features)
    assert colors.shape == (4, 4, 3) and colors.min() >= 0 and colors.max() <= 1
    expected = np.array([81, 25, 4]) / 110
    np.testing.assert_allclose(variance, expected, rtol=1e-6)
    # The halves of the map have opposite colors.
    for axis, component in ((0, 0), (1, 1)):
        halves = np.moveaxis(colors[..., component], axis, 0)
        assert np.ptp(halves[:2]) < 1e-5 and abs(halves[0].mean() - halves[-1].mean()) > 0.9
