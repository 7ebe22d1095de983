# Our choice, as it was not published: the recipe of 384.
_base_ = 'gcvit_l_384_imagenet.py'
model = dict(backbone=dict(window_size=(16, 16, 32, 16), resolution=512))
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 512
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 512
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
