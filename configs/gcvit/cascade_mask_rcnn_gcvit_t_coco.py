# Expected (published): box AP 51.6, mask AP 44.6; 85 M parameters, 770 GFLOPs at 1280x800.
# Training starts from ImageNet-1K weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as it was not published: drop path of the ImageNet training (0.2 for T, 0.3 S, 0.5 B).
_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='GCViT', arch='tiny', window_size=(24, 24, 24, 24)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
