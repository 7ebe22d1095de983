_base_ = 'dino_dat_t_36e_coco.py'
model = dict(backbone=dict(arch='small'))
