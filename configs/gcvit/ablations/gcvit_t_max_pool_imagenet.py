# Table 8: convolution and max pooling between the stages; published: 0.8 top-1 less.
_base_ = '../gcvit_t_imagenet.py'
model = dict(backbone=dict(downsampler='max_pool'))
