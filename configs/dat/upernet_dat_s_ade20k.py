_base_ = 'upernet_dat_t_ade20k.py'
model = dict(backbone=dict(arch='small'))
