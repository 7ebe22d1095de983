_base_ = 'fpn_quadtree_b0_ade20k.py'
model = dict(backbone=dict(arch='b1'), neck=dict(in_channels=[64, 128, 320, 512]))
