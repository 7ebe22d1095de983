_base_ = 'quadtree_b0_imagenet.py'
model = dict(backbone=dict(arch='b4'), head=dict(in_channels=512))
