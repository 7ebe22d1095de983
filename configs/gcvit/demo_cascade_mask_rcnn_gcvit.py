# The demo, run by tools/demo.py: Cascade Mask R-CNN with a GC ViT small enough to train on two CPU
# cores in minutes, on a generated data set whose folder MMATTN_COCO names. It differs from the
# full-size config in what images of 128 x 128 and six classes need.
_base_ = 'cascade_mask_rcnn_gcvit_t_coco.py'
classes = ('circle', 'triangle', 'square', 'star', 'ring', 'crescent')
channels = 48
epochs = 4

model = _base_.model
model.backbone.arch = dict(
    embed_dims=32, depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 8), mlp_ratio=3, drop_path_rate=0.05
)
model.backbone.window_size = (8, 8, 8, 4)
model.backbone.resolution = 128
del model.backbone.init_cfg
model.neck.update(in_channels=[32, 64, 128, 256], out_channels=channels)

model.rpn_head.update(in_channels=channels, feat_channels=channels)
# Objects are smaller than COCO's, and most large anchors cross the image border.
model.rpn_head.anchor_generator.scales = [4]
model.train_cfg.rpn.allowed_border = -1
model.train_cfg.rpn.sampler.num = 64
model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=64)
model.test_cfg.rpn.update(nms_pre=200, max_per_img=64)
model.roi_head.bbox_roi_extractor.update(out_channels=channels, finest_scale=28)
model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio = 2
model.roi_head.mask_roi_extractor.update(out_channels=channels, finest_scale=28)
model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio = 1

for head in model.roi_head.bbox_head:
    head.update(
        num_shared_convs=1,
        in_channels=channels,
        conv_out_channels=channels,
        fc_out_channels=256,
        num_classes=len(classes),
        norm_cfg=dict(type='BN'),
    )
for stage in model.train_cfg.rcnn:
    stage.sampler.update(num=16, pos_fraction=0.5)
model.roi_head.mask_head.update(
    num_convs=2,
    in_channels=channels,
    conv_out_channels=channels,
    num_classes=len(classes),
    norm_cfg=dict(type='BN'),
)
model.test_cfg.rcnn.max_per_img = 20
del head, stage

load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
]
train_pipeline = [
    *load,
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    *load,
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(metainfo=dict(classes=classes), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(metainfo=dict(classes=classes), pipeline=test_pipeline),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-3, fused=True), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_epochs=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=epochs,
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
# Logs each epoch's last iteration, so that the learning curve ends where training ends.
default_hooks = dict(logger=dict(interval=25, ignore_last=False))
randomness = dict(seed=0)
