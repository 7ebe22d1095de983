# Importing mmattn registers the backbones and hooks, in any tool.
custom_imports = dict(imports=['mmattn'], allow_failed_imports=False)

# Each schedule adds these to its task's default hooks.
training_hooks = dict(
    # mmengine deletes the oldest checkpoint before it writes the next, so one is not enough.
    checkpoint=dict(max_keep_ckpts=3),
    invalid_loss=dict(type='InvalidLossHook'),
    iteration_seed=dict(type='IterationSeedHook'),
)
