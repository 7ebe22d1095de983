# Keys on the regular grid: no offsets.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(offsets=False)))
