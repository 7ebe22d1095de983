# 12 epochs at batch 16, float32. Warmup (500 iterations) and drops (epochs 8 and 11) are mmdet's.
# As in GC ViT's official file, names with 'norm' do not decay: the BN of Cascade's heads does.
_base_ = [
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    '../runtime.py',
]
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'norm': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'position_bias.': dict(decay_mult=0.0),
        },
    ),
)
default_hooks = _base_.training_hooks
