# Swin V2's log-spaced continuous position bias.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(position_bias='log_cpb')))
