# Tested on the largest central square (crop 1.0), as XXT, B and L.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_320e_gcvit.py',
]
model = dict(
    backbone=dict(_delete_=True, type='GCViT', arch='tiny', out_indices=(3,)),
    head=dict(in_channels=512),
)
train_dataloader = dict(batch_size=128)  # per GPU, of 8
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 224
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
