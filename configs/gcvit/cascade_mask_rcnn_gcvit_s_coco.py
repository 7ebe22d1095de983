# Expected (published): box AP 52.4, mask AP 45.4; 108 M parameters, 866 GFLOPs at 1280x800.
_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[96, 192, 384, 768]))
