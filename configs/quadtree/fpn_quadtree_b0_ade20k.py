_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k_aligned.py',
    '../_base_/schedules/ade20k_fpn_160k.py',
]
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b0.pth'
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='QuadTree',
        arch='b0',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
