# Our choice, as it was not published: drop path of the ImageNet training.
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_80k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
