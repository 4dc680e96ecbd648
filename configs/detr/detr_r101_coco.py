"""DETR R101 on COCO, 500 epochs of 16 images a batch (arXiv:2005.12872: box AP 43.5 on val2017). Not measured here.

torchrun --nproc-per-node=8 tools/train.py configs/detr/detr_r101_coco.py --launcher pytorch
"""
_base_ = "detr_r50_coco.py"
model = dict(backbone=dict(depth=101, pretrained="torchvision://resnet101"))
