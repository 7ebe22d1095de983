# Fine-tunes dat_b_imagenet.py at a tenth of DAT++'s rate; tested on 0.875 of the central
# square, as at 224.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
checkpoint = 'https://cloud.tsinghua.edu.cn/f/a8d2a9645d454120b635/?dl=1'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='base',
        img_size=384,
        window_size=12,
        out_indices=(3,),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(in_channels=1024),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=438, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=4e-6))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=2e-7, by_epoch=True, end=30, convert_to_iter_based=True)
]
