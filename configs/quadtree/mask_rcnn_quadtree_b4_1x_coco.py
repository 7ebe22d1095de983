_base_ = 'mask_rcnn_quadtree_b0_1x_coco.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b4.pth'
)
model = dict(
    backbone=dict(arch='b4', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
