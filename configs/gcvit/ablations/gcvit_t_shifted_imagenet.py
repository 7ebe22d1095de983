# Table 5: Swin's shifted windows in place of global attention.
_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(odd_blocks='shifted'))
