_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[128, 256, 512, 1024]))
