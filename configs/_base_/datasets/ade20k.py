# ADE20K in crops of 512 x 512. The environment variable MMATTN_ADE20K overrides its folder.
_base_ = 'mmseg::_base_/datasets/ade20k.py'
data_root = '{{$MMATTN_ADE20K:data/ade/ADEChallengeData2016}}'.rstrip('/')
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_dataloader = dict(batch_size=2, **val_dataloader)  # per GPU, of 8
