_base_ = 'fpn_dat_tpp_ade20k.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/8e30492404d348d89f25/?dl=1'
model = dict(
    backbone=dict(arch='base++', drop_path_rate=0.7, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
