# Registers the backbones and the hooks, whichever tool reads the config.
custom_imports = dict(imports=['mmattn'], allow_failed_imports=False)

# Each schedule adds these to the default hooks of its task.
training_hooks = dict(
    # More than one, so that the last good checkpoint is there while the next one is being written.
    checkpoint=dict(max_keep_ckpts=3),
    invalid_loss=dict(type='InvalidLossHook'),
    iteration_seed=dict(type='IterationSeedHook'),
)
