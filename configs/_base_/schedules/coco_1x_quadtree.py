# QuadTree's detectors, 1x: weight decay 1e-4 on all parameters, as PVT v2's.
_base_ = 'coco_1x.py'
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=dict(_delete_=True))
