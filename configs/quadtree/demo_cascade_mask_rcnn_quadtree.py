# The demo with a small QuadTree backbone instead of GC ViT.
_base_ = '../gcvit/demo_cascade_mask_rcnn_gcvit.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='QuadTree',
        arch=dict(
            embed_dims=(32, 64, 128, 256),
            depths=(1, 2, 2, 1),
            num_heads=(1, 2, 4, 8),
            mlp_ratios=(4, 4, 4, 4),
            num_levels=(3, 3, 2, 1),
        ),
        topks=8,
        drop_path_rate=0.05,
    )
)
