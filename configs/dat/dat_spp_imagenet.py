_base_ = 'dat_tpp_imagenet.py'
model = dict(backbone=dict(arch='small++'), head=dict(in_channels=768))
