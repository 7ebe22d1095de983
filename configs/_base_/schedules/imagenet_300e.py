# 300 epochs at batch 1024: AdamW 1e-3, weight decay 0.05 (none on vectors and bias tables), 20 warmup
# epochs, cosine, clip norm 5; a leaf with more epochs goes on at the last rate.
# float32; `tools/train.py --amp` trains in mixed precision.
_base_ = [
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
    '../runtime.py',
]
optim_wrapper = dict(
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(custom_keys={'.rpe_table': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
default_hooks = _base_.training_hooks
