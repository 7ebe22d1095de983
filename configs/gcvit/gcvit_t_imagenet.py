# 10 epochs at the last learning rate follow. The weights' moving average is tested and saved.
# Our choice, as it was not published: the cosine ends at 1e-5, as Swin's in mmpretrain.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e.py',
]
model = dict(
    backbone=dict(_delete_=True, type='GCViT', arch='tiny', out_indices=(3,)),
    head=dict(in_channels=512),
)
train_cfg = dict(max_epochs=310)
custom_hooks = [dict(type='EMAHook', momentum=2e-4)]
