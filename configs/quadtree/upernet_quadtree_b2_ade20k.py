# Our choice, as it was not published: Swin's recipe.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
]
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b2.pth'
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='QuadTree',
        arch='b2',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
