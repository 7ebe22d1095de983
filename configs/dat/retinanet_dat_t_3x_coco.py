# Our choice, as it was not published: drop path of the ImageNet training.
# RetinaNet starts at the second stage, so that the first stage's map is not returned.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/1367349deefc48efa650/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='tiny',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
