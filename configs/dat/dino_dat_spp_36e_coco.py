# Not published: DINO's recipe for transformers, with the drop path of the ImageNet training (0.2 for T++, 0.4 for S++).
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = '../_base_/dino_36e_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='small++', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[192, 384, 768]),
)
