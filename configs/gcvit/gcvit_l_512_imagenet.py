# Expected (published): top-1 87.6 after fine-tuning the ImageNet-21K weights, as at 384.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_512.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='GCViT',
        arch='large',
        window_size=(16, 16, 32, 16),
        resolution=512,
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=1536),
    train_cfg=None,
)
