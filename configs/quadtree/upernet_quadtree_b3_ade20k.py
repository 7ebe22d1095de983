_base_ = 'upernet_quadtree_b2_ade20k.py'
model = dict(backbone=dict(arch='b3'))
