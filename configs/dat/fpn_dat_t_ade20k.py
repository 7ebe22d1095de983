# Our choice, as it was not published: drop path of the ImageNet training.
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_80k.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/1367349deefc48efa650/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='tiny',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
