_base_ = 'mask_rcnn_quadtree_b0_3x_coco.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b2.pth'
)
model = dict(
    backbone=dict(arch='b2', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
