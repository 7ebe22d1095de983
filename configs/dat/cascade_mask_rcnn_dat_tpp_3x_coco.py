# Expected (published): box AP 53.0, mask AP 46.0.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Drop path and learning rate are the publication's; on fewer images a step, use --auto-scale-lr.
_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny++', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
auto_scale_lr = dict(base_batch_size=64)
