# Expected (published): top-1 84.8; 68 M parameters, 10.7 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='small2'), head=dict(in_channels=768))
