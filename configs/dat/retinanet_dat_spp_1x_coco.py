_base_ = 'retinanet_dat_tpp_1x_coco.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/4c2a76360c964fbd81d5/?dl=1'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[192, 384, 768]),
)
