# Our choice, as it was not published: drop path of the ImageNet training.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
