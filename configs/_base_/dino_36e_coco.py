# DINO, four scales, 36 epochs; as in mmdet, model, data and schedule are one base. The optimizer is
# mmdet's too: AdamW, learning rate 1e-4, a tenth of it for the backbone, weight decay 1e-4.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py', 'runtime.py']
data_root = '{{$MMATTN_COCO:data/coco}}'.rstrip('/') + '/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# If two keys match a parameter, the longer one alone applies, so the backbone's rate is repeated.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'relative_position_bias_table': dict(lr_mult=0.1, decay_mult=0.0),
            'position_bias.': dict(lr_mult=0.1, decay_mult=0.0),
        }
    )
)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1)
]
default_hooks = _base_.training_hooks
