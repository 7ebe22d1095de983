_base_ = 'dat_tpp_imagenet.py'
model = dict(backbone=dict(arch='base++'), head=dict(in_channels=1024))
