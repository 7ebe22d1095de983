# Expected (published): top-1 83.7; 34 M parameters, 5.5 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='tiny2'))
