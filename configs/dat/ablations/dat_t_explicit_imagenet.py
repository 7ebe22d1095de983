# DAT-T with its architecture spelled out, for the ablations to change.
_base_ = '../dat_t_imagenet.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            dims=(96, 192, 384, 768),
            blocks=('LS', 'LS', 'LDLDLD', 'LD'),
            num_heads=(3, 6, 12, 24),
            groups=(0, 0, 3, 6),
            drop_path_rate=0.2,
        )
    )
)
