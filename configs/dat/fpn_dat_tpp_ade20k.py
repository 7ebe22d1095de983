_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_fpn_40k.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/14c5ddae10b642e68089/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='tiny++',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)  # per GPU, of 8
