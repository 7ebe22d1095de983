# GC ViT: a cosine over 310 epochs, the first 20 of them warmup, then 10 epochs at the last rate.
# The weights' moving average is tested and saved.
# The rate is the paper's: the official files scale 5e-3 by a number of GPUs that they do not say.
# Bias tables do not decay: the official code exempts them by a keyword that no parameter has.
_base_ = 'imagenet_300e.py'
train_cfg = dict(max_epochs=320)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=0, end=310),
]
custom_hooks = [dict(type='EMAHook', momentum=2e-4)]
