_base_ = 'gcvit_t_imagenet.py'
model = dict(backbone=dict(arch='base'), head=dict(in_channels=1024))
train_dataloader = dict(batch_size=32)  # per GPU, of 32
