# RetinaNet starts at the second stage, so that the first stage's map is not returned.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x_quadtree.py',
]
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b0.pth'
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='QuadTree',
        arch='b0',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 160, 256], start_level=0),
)
