_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x_datpp.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny++', drop_path_rate=0.0),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
