_base_ = 'retinanet_dat_t_3x_coco.py'
model = dict(backbone=dict(arch='small'))
