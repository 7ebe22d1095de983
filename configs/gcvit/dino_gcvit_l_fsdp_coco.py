_base_ = ['dino_gcvit_l_coco.py', '../_base_/fsdp.py']
