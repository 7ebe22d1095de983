# Expected (published): top-1 82.0; 20 M parameters, 2.6 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='xtiny'))
