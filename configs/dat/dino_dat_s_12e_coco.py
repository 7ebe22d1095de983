_base_ = 'dino_dat_t_12e_coco.py'
model = dict(backbone=dict(arch='small'))
