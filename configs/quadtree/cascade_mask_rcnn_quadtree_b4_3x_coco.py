_base_ = 'cascade_mask_rcnn_quadtree_b2_3x_coco.py'
checkpoint = (
    'https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b4.pth'
)
model = dict(backbone=dict(arch='b4', init_cfg=dict(checkpoint=checkpoint)))
