_base_ = 'fpn_dat_t_ade20k.py'
model = dict(backbone=dict(arch='small'))
