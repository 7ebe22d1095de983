# Table 8: Swin's patch merging between the stages; published: 0.6 top-1 less.
_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(downsampler='patch_merging'))
