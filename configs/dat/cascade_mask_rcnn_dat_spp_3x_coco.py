# Expected (published): box AP 54.2, mask AP 46.9.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Drop path and learning rate are the publication's; on fewer images a step, use --auto-scale-lr.
_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='small++', drop_path_rate=0.5),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
auto_scale_lr = dict(base_batch_size=64)
