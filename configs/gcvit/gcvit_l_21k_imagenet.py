# GC ViT-L at 224, trained on ImageNet-21K, then fine-tuned.
_base_ = 'gcvit_l_imagenet.py'
