# Tested on 0.875 of that square, as T2, S and S2.
_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='xtiny'))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 256
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
