# COCO. The environment variable MMATTN_COCO overrides its folder.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
data_root = '{{$MMATTN_COCO:data/coco}}'.rstrip('/') + '/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
