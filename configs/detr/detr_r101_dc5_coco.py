"""DETR R101-DC5 on COCO, 500 epochs (arXiv:2005.12872: box AP 44.9 on val2017): the last stage dilated, its map twice as fine. Not
measured here. Evaluate with one image a batch, as here: padding costs AP.

torchrun --nproc-per-node=16 tools/train.py configs/detr/detr_r101_dc5_coco.py --launcher pytorch
"""
_base_ = "detr_r50_dc5_coco.py"
model = dict(backbone=dict(depth=101, pretrained="torchvision://resnet101"))
