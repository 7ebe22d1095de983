# The demo with a small DAT instead of GC ViT.
_base_ = '../gcvit/demo_cascade_mask_rcnn_gcvit.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch=dict(
            dims=(32, 64, 128, 256),
            blocks=('L', 'LS', 'LDLD', 'LD'),
            num_heads=(1, 2, 4, 8),
            groups=(0, 0, 2, 4),
            drop_path_rate=0.05,
        ),
        img_size=128,
        window_size=8,
    )
)
