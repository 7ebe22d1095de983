# DAT++'s Semantic FPN: 40,000 iterations at batch 32.
_base_ = 'ade20k_fpn_80k.py'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000)]
auto_scale_lr = dict(base_batch_size=32)
