# Global average pooling and a linear head; label smoothing 0.1, mixup 0.8, CutMix 1.0.
_base_ = 'mmpretrain::_base_/models/swin_transformer/tiny_224.py'
