# With repeated augmentation: an epoch has a third of the images, each three times.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e_quadtree.py',
]
model = dict(
    backbone=dict(
        _delete_=True, type='QuadTree', arch='b0', topks=8, value_act='GELU', out_indices=(3,)
    ),
    head=dict(in_channels=256),
)
train_dataloader = dict(sampler=dict(type='RepeatAugSampler'))
