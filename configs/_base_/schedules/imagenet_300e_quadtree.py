# QuadTree, as PVT v2: mixed precision, no clipping; a cosine over 300 epochs, the first 5 of them
# warmup. The official files' 10 epochs of cooldown are never run.
_base_ = 'imagenet_300e.py'
optim_wrapper = dict(type='AmpOptimWrapper', clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=300),
]
