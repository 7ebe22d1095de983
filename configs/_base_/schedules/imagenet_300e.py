# 300 epochs at batch 1024: AdamW, learning rate 1e-3, weight decay 0.05 (none on vectors and
# position bias tables), 20 epochs of warmup, then cosine.
_base_ = [
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
    '../runtime.py',
]
optim_wrapper = dict(
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(custom_keys={'position_bias.': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
default_hooks = _base_.training_hooks
# Without the scope that mmengine notes in an inherited one: mmpretrain's browse_dataset.py passes
# all keys but the type to the class.
visualizer = dict(
    _delete_=True, type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)
