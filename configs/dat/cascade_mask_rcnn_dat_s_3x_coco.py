_base_ = 'cascade_mask_rcnn_dat_t_3x_coco.py'
model = dict(backbone=dict(arch='small'))
