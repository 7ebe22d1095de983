_base_ = 'fpn_quadtree_b0_ade20k.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b3.pth'
)
model = dict(
    backbone=dict(arch='b3', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
