# ADE20K in crops of 512 x 512. The environment variable MMATTN_ADE20K overrides its folder.
_base_ = 'mmseg::_base_/datasets/ade20k.py'
data_root = '{{$MMATTN_ADE20K:data/ade/ADEChallengeData2016}}'.rstrip('/')
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_dataloader = dict(batch_size=2, **val_dataloader)  # per GPU, of 8

# Multi-scale testing scales the size of single-scale testing, as mmseg 0.x did for the papers;
# mmseg 1.x would scale the size of the file.
_sizes = [
    dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
]
_flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            _sizes,
            _flips,
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
del _sizes, _flips
