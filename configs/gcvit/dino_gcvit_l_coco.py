# From ImageNet-21K weights, those of 384: their third stage has this config's windows of 24.
# Our choice, as it was not published: that file, DINO's recipe for transformers, drops at 27 and
# 33, drop path of the ImageNet training, activation checkpointing.
_base_ = '../_base_/dino_36e_coco.py'
checkpoint = 'https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_21k_large_384.pth.tar'
model = dict(
    backbone=dict(
        _delete_=True,
        type='GCViT',
        arch='large',
        window_size=(24, 24, 24, 24),
        out_indices=(1, 2, 3),
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
