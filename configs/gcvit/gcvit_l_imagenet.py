# Expected (published): top-1 85.7; 201 M parameters, 32.6 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='large'), head=dict(in_channels=1536))
