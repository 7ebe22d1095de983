# Our choice, as it was not published: DINO's recipe for transformers.
_base_ = '../_base_/dino_12e_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='QuadTree', arch='b2', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 320, 512]),
)
