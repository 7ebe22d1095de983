# Expected (published): box AP 52.9, mask AP 45.8; 146 M parameters, 1018 GFLOPs at 1280x800.
_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[128, 256, 512, 1024]))
