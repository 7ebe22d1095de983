# dino_36e_coco.py with 12 epochs and one drop of the learning rate, at 11.
_base_ = 'dino_36e_coco.py'
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1)
]
