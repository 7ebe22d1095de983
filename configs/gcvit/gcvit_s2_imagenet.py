_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='small2'), head=dict(in_channels=768))
