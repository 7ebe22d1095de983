# Our choice, as it was not published: DINO's recipe for transformers, and the drop path of the
# ImageNet training.
_base_ = '../_base_/dino_36e_coco.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/1367349deefc48efa650/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='tiny',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
