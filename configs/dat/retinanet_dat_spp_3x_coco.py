# Expected (published): box AP 50.2.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Drop path and learning rate are the publication's; on fewer images a step, use --auto-scale-lr.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
# RetinaNet starts from the second stage: the first one's map is not made.
model = dict(
    backbone=dict(
        _delete_=True, type='DAT', arch='small++', drop_path_rate=0.5, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=32)
