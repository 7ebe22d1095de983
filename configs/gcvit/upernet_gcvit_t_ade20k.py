# Expected (published): B 49.2 mIoU, single scale; our sources give no figure for T and S.
# Training starts from ImageNet-1K weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as they were not published: windows and drop path of the ImageNet training.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
]
model = dict(
    backbone=dict(_delete_=True, type='GCViT', arch='tiny'),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
