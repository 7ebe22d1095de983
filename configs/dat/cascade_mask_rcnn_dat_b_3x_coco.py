_base_ = 'cascade_mask_rcnn_dat_t_3x_coco.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/a8d2a9645d454120b635/?dl=1'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
