_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e_dat.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny++', out_indices=(3,)),
    head=dict(in_channels=512),
)
