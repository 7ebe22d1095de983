_base_ = 'fpn_dat_t_ade20k.py'
model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[128, 256, 512, 1024]))
