# Offsets without bound.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(offset_range=None)))
