_base_ = 'retinanet_dat_tpp_3x_coco.py'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.5),
    neck=dict(in_channels=[192, 384, 768]),
)
