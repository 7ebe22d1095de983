# DETR's multi-scale augmentation, which Swin and all three families use in 3x schedules: half of
# the images are resized, the other half resized, cropped, and resized again.
_resize = dict(
    type='RandomChoiceResize',
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True,
)
_crop = [
    dict(
        type='RandomChoiceResize',
        scales=[(400, 1333), (500, 1333), (600, 1333)],
        keep_ratio=True,
    ),
    dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=(384, 600),
        allow_negative_crop=True,
    ),
]
multiscale = [
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoice', transforms=[[_resize], [*_crop, _resize]]),
]
del _resize, _crop
