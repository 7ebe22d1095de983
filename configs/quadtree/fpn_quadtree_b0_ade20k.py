# Expected (published): 39.9 mIoU.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_160k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='QuadTree', arch='b0'),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
