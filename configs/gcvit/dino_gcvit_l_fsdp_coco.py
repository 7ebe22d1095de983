# Expected (published): as dino_gcvit_l_coco.py, which this is with its model spread over the processes:
# tools/dist_train.sh trains it, and either config tests what comes out.
_base_ = ['dino_gcvit_l_coco.py', '../_base_/fsdp.py']
