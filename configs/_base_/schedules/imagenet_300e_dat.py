# DAT, and by our choice DAT++ (not published): mixed precision.
_base_ = 'imagenet_300e.py'
optim_wrapper = dict(type='AmpOptimWrapper')
