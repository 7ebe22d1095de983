# Parameters, gradients and optimiser states are spread over the processes of tools/dist_train.sh, block
# by block. Checkpoints are written whole by the first one, under the usual names.
# No moving average (EMAHook) with it: it copies the model, which FSDP does not allow.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='mmattn.engine.fsdp.BlockFSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,
        auto_wrap_policy=dict(type='mmattn.engine.fsdp.wrap_blocks'),
    ),
    state_dict_cfg='full',
)
