_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[96, 192, 384, 768]))
