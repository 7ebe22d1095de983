_base_ = 'gcvit_xt_imagenet.py'
model = dict(backbone=dict(arch='tiny2'))
