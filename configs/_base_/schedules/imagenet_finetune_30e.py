# DAT++'s fine-tuning at 384: 30 epochs at batch 1024 without warmup.
_base_ = 'imagenet_300e_dat.py'
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=4e-7, by_epoch=True, end=30, convert_to_iter_based=True)
]
