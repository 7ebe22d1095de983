# Expected (published): top-1 85.0; 90 M parameters, 14.8 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='base'), head=dict(in_channels=1024))
