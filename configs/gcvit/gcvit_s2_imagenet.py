_base_ = 'gcvit_s_imagenet.py'
model = dict(backbone=dict(arch='small2'))
