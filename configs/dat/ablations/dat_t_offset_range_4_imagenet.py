# Offsets of at most 4 steps of the grid.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(offset_range=4.0)))
