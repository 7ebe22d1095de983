# The published baseline, mmdet's PVT v2: QuadTree attention replaces its spatial reduction.
_base_ = '../mask_rcnn_quadtree_b2_1x_coco.py'
checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
