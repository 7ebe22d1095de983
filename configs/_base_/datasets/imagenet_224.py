# ImageNet-1K at 224: RandAugment (magnitude 9, std 0.5), random erasing (0.25); the model has mixup
# and CutMix. The environment variable MMATTN_IMAGENET overrides the folder that has train and val.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'
train_dataloader = dict(
    dataset=dict(data_root='{{$MMATTN_IMAGENET:data/imagenet}}'.rstrip('/')),
    # mmpretrain's train.py adds these. Without them the model gets lists, mmengine's default.
    collate_fn=dict(type='default_collate'),
    pin_memory=True,
    persistent_workers=True,
)
val_dataloader = train_dataloader
test_dataloader = train_dataloader
