# Swin's fine-tuning from ImageNet-21K: 30 epochs at batch 1024, the first 5 of them warmup.
_base_ = 'imagenet_300e.py'
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=4e-7, by_epoch=True, begin=5, end=30),
]
