_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(offset_range=4.0)))
