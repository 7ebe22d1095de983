# Expected (published): top-1 79.9; 12 M parameters, 2.1 GFLOPs.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='xxtiny'))
