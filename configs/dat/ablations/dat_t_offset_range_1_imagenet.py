# Offsets of at most 1 step of the grid.
_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(offset_range=1.0)))
