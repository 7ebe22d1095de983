# QuadTree's Semantic FPN: UPerNet's schedule, with ten times the learning rate for the head.
_base_ = 'ade20k_160k.py'
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))))
