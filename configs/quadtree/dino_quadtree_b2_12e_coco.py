# Our choice, as it was not published: DINO's recipe for transformers.
_base_ = '../_base_/dino_12e_coco.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b2.pth'
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='QuadTree',
        arch='b2',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
