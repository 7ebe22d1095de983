# One offset group: all channels are sampled at the same points.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(groups=(0, 0, 1, 1))))
