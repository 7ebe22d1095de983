# Expected (published): top-1 84.3; 51 M parameters, 8.5 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
