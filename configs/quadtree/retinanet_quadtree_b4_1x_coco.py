# Expected (published): box AP 47.9.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x.py',
]
# RetinaNet starts from the second stage: the first one's map is not handed on.
model = dict(
    backbone=dict(_delete_=True, type='QuadTree', arch='b4', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 320, 512], start_level=0),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
