# Expected (published): 49.9 mIoU.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Drop path is the publication's.
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_80k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='small++', drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
