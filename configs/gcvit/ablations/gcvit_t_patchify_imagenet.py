# Table 5: Swin's stem; published: the CNN stem brings 0.3 top-1.
_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(stem='patchify'))
