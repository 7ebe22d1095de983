# Tests on ImageNetV2; README.md says how to make val.txt.
_base_ = 'gcvit_t_imagenet.py'
_folder = 'imagenetv2-matched-frequency-format-val'
test_dataloader = dict(dataset=dict(data_prefix=_folder, ann_file=_folder + '/val.txt'))
del _folder
