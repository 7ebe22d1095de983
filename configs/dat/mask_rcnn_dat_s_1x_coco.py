_base_ = 'mask_rcnn_dat_t_1x_coco.py'
model = dict(backbone=dict(arch='small'))
