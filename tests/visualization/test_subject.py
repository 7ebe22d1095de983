"""Models from configs, image files, and the map between pixels of a file and of the input."""

import cv2
import numpy as np
import pytest
import torch

from mmattn.visualization import Subject
from mmattn.visualization.subject import Placement, read_image

CLASSIFIER = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmattn'])
arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), mlp_ratio=1)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='GCViT', arch=arch, window_size=(4, 4, 4, 4), out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=128),
    data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255], to_rgb=True),
)
test_dataloader = dict(
    dataset=dict(type='CustomDataset', data_prefix='nowhere', pipeline=[
        dict(type='LoadImageFromFile'),
        {steps}
        dict(type='PackInputs'),
    ])
)
"""
CROP = "dict(type='ResizeEdge', scale=64, edge='short'), dict(type='CenterCrop', crop_size=56),"
RESIZE = "dict(type='Resize', scale=(96, 48)),"


@pytest.fixture
def subject(tmp_path, request):
    path = tmp_path / 'config.py'
    path.write_text(CLASSIFIER.replace('{steps}', request.param))
    return Subject(path)


def write(path, height, width):
    """An image with a white square of 5 pixels around (40, 70)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[38:43, 68:73] = 255
    cv2.imwrite(str(path), image)
    return path


@pytest.mark.parametrize(
    'subject, scale, offset, size',
    [
        (CROP, (1.5, 1.5), (6, 18), (56, 56)),  # 96 x 120 -> 64 x 80 -> 56 x 56
        (RESIZE, (96 / 48, 120 / 96), (0, 0), (48, 96)),
        ('', (1, 1), (0, 0), (96, 120)),
    ],
    indirect=['subject'],
    ids=['crop', 'resize', 'unchanged'],
)
def test_placement_matches_the_pipeline(subject, tmp_path, scale, offset, size):
    view = subject.look(write(tmp_path / 'image.png', 96, 120))
    placement = view.placement
    assert (
        placement.file_size == (96, 120) and placement.seen_size == view.picture.shape[:2] == size
    )
    np.testing.assert_allclose(placement.scale, scale, rtol=0.01)
    np.testing.assert_allclose(placement.offset, offset, atol=0.5)
    y, x = placement.seen(40, 70)
    bright = np.argwhere(view.picture[..., 0] > 127)
    np.testing.assert_allclose(bright.mean(0) + 0.5, (y, x), atol=0.6)
    mask = np.zeros((96, 120), np.uint8)
    mask[38:43, 68:73] = 1
    np.testing.assert_allclose(np.argwhere(placement.labels(mask)).mean(0) + 0.5, (y, x), atol=0.7)
    (box,) = placement.boxes(np.array([[68.0, 38, 73, 43]]))
    np.testing.assert_allclose([(box[1] + box[3]) / 2, (box[0] + box[2]) / 2], (y, x), atol=0.1)
    assert view.prediction.shape == (3,)
    assert subject.classes == ('class 0', 'class 1', 'class 2')
    assert len(view.seen.blocks) == 4


def test_query_outside_is_an_error():
    placement = Placement((1.5, 1.5), (6, 18), (96, 120), (56, 56))
    for query in ((96, 0), (0, 120), (-1, 5)):
        with pytest.raises(ValueError, match=r'image of 96 x 120 pixels \(height x width\)'):
            placement.seen(*query)
    with pytest.raises(ValueError, match=r'cropped away .* keeps y 6 to 89, x 18 to 101'):
        placement.seen(50, 110)


def test_unreadable_image_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'there is no image .*none\.jpg'):
        read_image(tmp_path / 'none.jpg')
    for content in (b'', b'no image'):
        (tmp_path / 'broken.jpg').write_bytes(content)
        with pytest.raises(ValueError, match=r'broken\.jpg is no image that can be read'):
            read_image(tmp_path / 'broken.jpg')


def test_weights_of_mmdets_swin(tmp_path):
    """A checkpoint of a training; Swin's layers have no names of this package."""
    path = tmp_path / 'swin.py'
    path.write_text("""
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='SwinTransformer', embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    ),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5),
    bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8),
)
""")
    trained = Subject(path).model.state_dict()
    torch.save(dict(state_dict=trained), tmp_path / 'epoch_1.pth')
    for name, value in Subject(path, tmp_path / 'epoch_1.pth').model.state_dict().items():
        assert torch.equal(value, trained[name]), name
