# ImageNet-1K at 224: RandAugment m9 std 0.5, random erasing 0.25; mixup and cutmix are the model's.
# The environment variable MMATTN_IMAGENET overrides where it lies (folders train and val).
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'
train_dataloader = dict(
    dataset=dict(data_root='{{$MMATTN_IMAGENET:data/imagenet}}'.rstrip('/')),
    # What mmpretrain's own train.py adds; mmengine's default would hand lists to the model.
    collate_fn=dict(type='default_collate'),
    pin_memory=True,
    persistent_workers=True,
)
val_dataloader = train_dataloader
test_dataloader = train_dataloader
