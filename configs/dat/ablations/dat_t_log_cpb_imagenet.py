_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(position_bias='log_cpb')))
