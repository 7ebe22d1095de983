_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(odd_blocks='shifted'))
