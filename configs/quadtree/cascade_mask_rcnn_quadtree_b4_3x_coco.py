# Not published: Cascade Mask R-CNN's recipe for Swin.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='QuadTree', arch='b4'),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
