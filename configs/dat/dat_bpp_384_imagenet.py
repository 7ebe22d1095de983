# Our choice, as it was not published: Swin's fine-tuning; drop path as at 224.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='base++', img_size=384, out_indices=(3,)),
    head=dict(in_channels=1024),
    train_cfg=None,
)
