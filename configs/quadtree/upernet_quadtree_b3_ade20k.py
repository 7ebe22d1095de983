_base_ = 'upernet_quadtree_b2_ade20k.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b3.pth'
)
model = dict(backbone=dict(arch='b3', init_cfg=dict(checkpoint=checkpoint)))
