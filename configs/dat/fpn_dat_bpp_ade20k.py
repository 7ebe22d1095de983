_base_ = 'fpn_dat_tpp_ade20k.py'
model = dict(
    backbone=dict(arch='base++', drop_path_rate=0.7),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
