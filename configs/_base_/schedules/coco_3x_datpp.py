# DAT++'s detectors: learning rate 4e-4 at batch 64, 2 images on each of 32 GPUs, in mixed
# precision. For fewer images per step, --auto-scale-lr.
_base_ = 'coco_3x.py'
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(lr=4e-4))
auto_scale_lr = dict(base_batch_size=64)
