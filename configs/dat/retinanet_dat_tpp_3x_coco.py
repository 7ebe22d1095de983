# RetinaNet starts at the second stage, so that the first stage's map is not returned.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection_multiscale.py',
    '../_base_/schedules/coco_3x_datpp.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/14c5ddae10b642e68089/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='tiny++',
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
