_base_ = 'upernet_dat_t_ade20k.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/a8d2a9645d454120b635/?dl=1'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
