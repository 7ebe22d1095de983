# Our choice, as it was not published: drop path of the ImageNet training.
_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
