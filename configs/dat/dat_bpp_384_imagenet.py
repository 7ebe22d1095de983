# Fine-tunes dat_bpp_imagenet.py. The position tables keep the size of 224, as in the official file.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/8e30492404d348d89f25/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='base++',
        drop_path_rate=0.6,
        out_indices=(3,),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(in_channels=1024),
)
