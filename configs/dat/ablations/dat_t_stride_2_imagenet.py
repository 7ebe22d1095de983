_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(strides=(1, 1, 2, 2))))
