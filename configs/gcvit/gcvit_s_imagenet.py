_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
