# Global mean, a linear head with label smoothing 0.1; mixup 0.8 and cutmix 1.0 in training.
_base_ = 'mmpretrain::_base_/models/swin_transformer/tiny_224.py'
