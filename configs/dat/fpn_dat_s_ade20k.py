# No result in our sources.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as it was not published: drop path of the ImageNet training (0.3).
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_80k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='small'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
