_base_ = 'mask_rcnn_quadtree_b0_1x_coco.py'
model = dict(backbone=dict(arch='b3'), neck=dict(in_channels=[64, 128, 320, 512]))
