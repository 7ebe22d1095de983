_base_ = 'quadtree_b3_imagenet.py'
model = dict(backbone=dict(arch='b4'))
