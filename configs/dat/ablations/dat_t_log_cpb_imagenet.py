# Swin V2's log-spaced continuous position bias.
_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(position_bias='log_cpb')))
