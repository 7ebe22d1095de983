_base_ = 'dat_t_explicit_imagenet.py'
model = dict(backbone=dict(arch=dict(groups=(0, 0, 1, 1))))
