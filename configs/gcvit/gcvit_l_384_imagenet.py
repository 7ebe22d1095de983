# Fine-tunes gcvit_l_21k_imagenet.py. Rate and length are those of the one official file for 384,
# which may be stale: the official code has no model of its name. Drop path is the code's.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_320e_gcvit.py',
]
checkpoint = 'https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_21k_large_224.pth.tar'
model = dict(
    backbone=dict(
        _delete_=True,
        type='GCViT',
        arch='large',
        window_size=(12, 12, 24, 12),
        resolution=384,
        out_indices=(3,),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(in_channels=1536),
)
