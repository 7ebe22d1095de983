_base_ = 'mask_rcnn_dat_t_3x_coco.py'
checkpoint = 'https://cloud.tsinghua.edu.cn/f/f04b18081e3e4606adb7/?dl=1'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)))
