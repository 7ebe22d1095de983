# Tests a classifier on ImageNetV2, matched frequency, unpacked in ImageNet's folder (MMATTN_IMAGENET). Its class
# folders are numbers, which mmpretrain would sort as text (0, 1, 10, 100), so list the labels once:
#   cd data/imagenet/imagenetv2-matched-frequency-format-val
#   find . -name '*.jpeg' | sed -E 's|^./([0-9]+)/.*|& \1|' > val.txt
# Other sizes: the same two lines below the size's own config, or --cfg-options for both keys.
_base_ = 'gcvit_t_imagenet.py'
_folder = 'imagenetv2-matched-frequency-format-val'
test_dataloader = dict(dataset=dict(data_prefix=_folder, ann_file=_folder + '/val.txt'))
del _folder
