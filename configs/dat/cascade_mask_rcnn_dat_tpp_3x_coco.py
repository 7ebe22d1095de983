_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x_datpp.py',
]
model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='tiny++', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
