_base_ = 'mask_rcnn_dat_tpp_1x_coco.py'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
