_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_160k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='QuadTree', arch='b0'),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
