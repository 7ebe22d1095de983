_base_ = 'dat_t_imagenet.py'
model = dict(backbone=dict(arch='small'))
