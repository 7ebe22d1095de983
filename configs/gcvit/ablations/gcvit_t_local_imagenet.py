# Table 5: no global attention; published: it brings 0.9 top-1.
_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(odd_blocks='local'))
