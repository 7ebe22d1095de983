_base_ = 'cascade_mask_rcnn_dat_tpp_3x_coco.py'
model = dict(
    backbone=dict(arch='base++', drop_path_rate=0.8),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
