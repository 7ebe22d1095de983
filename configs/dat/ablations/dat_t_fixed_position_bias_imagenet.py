# A fixed bias for each pair of cells.
_base_ = 'dat_t_as_dict.py'
model = dict(backbone=dict(arch=dict(position_bias='fixed')))
