# Expected (published): box AP 58.3, from ImageNet-21K weights, four scales, 36 epochs.
# Training starts from ImageNet-21K weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as they were not published: DINO's usual optimiser for transformers, drops at 27 and 33,
# drop path 0.5 as in ImageNet training, and recomputation in place of activation memory.
_base_ = '../_base_/dino_36e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='GCViT',
        arch='large',
        window_size=(24, 24, 24, 24),
        out_indices=(1, 2, 3),
        with_cp=True,
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
