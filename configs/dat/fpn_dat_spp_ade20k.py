_base_ = 'fpn_dat_tpp_ade20k.py'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
