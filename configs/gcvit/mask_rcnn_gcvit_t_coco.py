# Expected (published): box AP 47.9, mask AP 43.2; 48 M parameters, 291 GFLOPs at 1280x800.
# Training starts from ImageNet-1K weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as it was not published: drop path 0.2, that of the ImageNet training.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='GCViT', arch='tiny', window_size=(24, 24, 24, 24)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
