# Our choice, as it was not published: drop path of the ImageNet training.
_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
checkpoint = 'https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_1k_base.pth.tar'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
