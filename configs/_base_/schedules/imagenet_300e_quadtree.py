# QuadTree, as PVT v2: 5 epochs of warmup, and 10 at the last learning rate after the cosine.
_base_ = 'imagenet_300e.py'
train_cfg = dict(max_epochs=310)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
