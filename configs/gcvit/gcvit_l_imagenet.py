_base_ = 'gcvit_b_imagenet.py'
model = dict(backbone=dict(arch='large'), head=dict(in_channels=1536))
