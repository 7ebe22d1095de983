# In float32, 1 image on each of 64 GPUs.
_base_ = 'cascade_mask_rcnn_dat_tpp_3x_coco.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/8e30492404d348d89f25/?dl=1'
model = dict(
    backbone=dict(arch='base++', drop_path_rate=0.8, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(type='OptimWrapper')
