_base_ = 'cascade_mask_rcnn_quadtree_b2_3x_coco.py'
model = dict(backbone=dict(arch='b3'))
