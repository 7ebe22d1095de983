_base_ = 'dino_dat_tpp_12e_coco.py'
model = dict(backbone=dict(arch='small++'), neck=dict(in_channels=[192, 384, 768]))
