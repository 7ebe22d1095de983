_base_ = 'upernet_dat_tpp_ade20k.py'
model = dict(
    backbone=dict(arch='small++', drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
