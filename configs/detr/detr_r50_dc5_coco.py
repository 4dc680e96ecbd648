"""DETR R50-DC5 on COCO, 500 epochs (arXiv:2005.12872: box AP 43.3 on val2017): the last stage dilated, its map twice as fine. Not
measured here. Evaluate with one image a batch, as here: padding costs AP.

torchrun --nproc-per-node=16 tools/train.py configs/detr/detr_r50_dc5_coco.py --launcher pytorch
"""
_base_ = "detr_r50_coco.py"
train_dataloader = dict(batch_size=1)
model = dict(backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), dilate_first=False))
