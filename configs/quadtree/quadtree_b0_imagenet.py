# Expected (published): top-1 72.0; 3.5 M parameters, 0.7 GFLOPs.
# 10 epochs at the last learning rate follow the 300.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e_quadtree.py',
]
model = dict(
    backbone=dict(
        _delete_=True, type='QuadTree', arch='b0', topks=8, value_act='GELU', out_indices=(3,)
    ),
    head=dict(in_channels=256),
)
