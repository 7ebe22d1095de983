_base_ = 'cascade_mask_rcnn_dat_tpp_3x_coco.py'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.5),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
