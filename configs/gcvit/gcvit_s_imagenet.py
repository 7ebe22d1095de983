_base_ = 'gcvit_xt_imagenet.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
train_dataloader = dict(batch_size=32)  # per GPU, of 32
