_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(stem='patchify'))
