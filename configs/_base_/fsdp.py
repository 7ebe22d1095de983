# Shards parameters, gradients and optimizer states over the ranks of tools/dist_train.sh, block by
# block. Rank 0 writes full checkpoints with the usual parameter names.
# Cannot be combined with EMAHook, which copies the model; FSDP does not allow that.
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
