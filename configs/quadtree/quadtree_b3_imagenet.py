_base_ = 'quadtree_b0_imagenet.py'
model = dict(backbone=dict(arch='b3'), head=dict(in_channels=512))
