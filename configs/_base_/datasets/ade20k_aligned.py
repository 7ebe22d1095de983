# QuadTree's AlignResize: for testing, the resized image is stretched to multiples of 32.
_base_ = 'ade20k.py'
test_pipeline = _base_.test_pipeline
test_pipeline.insert(2, dict(type='ResizeToMultiple', size_divisor=32))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
