# For the weights that were trained on ImageNet-21K, then on ImageNet-1K. How was not published:
# trained from here, it is gcvit_l_imagenet.py.
_base_ = 'gcvit_l_imagenet.py'
