_base_ = 'retinanet_dat_t_1x_coco.py'
model = dict(backbone=dict(arch='small'))
