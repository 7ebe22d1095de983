# Expected (published): top-1 85.9 after fine-tuning the weights of 224; 49.7 GFLOPs.
# Training starts from ImageNet weights, published or own, in any format that mmattn reads:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
# Our choice, as it was not published: the fine-tuning is Swin's: 30 epochs, AdamW 4e-5 at batch 1024,
# weight decay 1e-8, 5 warmup epochs, no mixing; drop path as at 224.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_finetune_30e.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='base++',
        img_size=384,
        out_indices=(3,),
    ),
    head=dict(in_channels=1024),
    train_cfg=None,
)
