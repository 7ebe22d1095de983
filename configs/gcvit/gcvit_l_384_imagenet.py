# Fine-tunes the ImageNet-21K weights. Drop path is the publication's.
# Our choice, as it was not published: Swin's fine-tuning.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='GCViT',
        arch='large',
        window_size=(12, 12, 24, 12),
        resolution=384,
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=1536),
    train_cfg=None,
)
