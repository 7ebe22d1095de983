# Keys on the regular grid: no offsets.
_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(offsets=False)))
