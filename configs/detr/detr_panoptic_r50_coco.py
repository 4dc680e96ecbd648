"""Panoptic DETR R50 on COCO (arXiv:2005.12872, sec. 4.4), second stage of two: the mask head for 25 epochs of 16 images a batch, DETR
frozen. Not measured here; the authors have PQ 0.434, box AP 0.388 and segment AP 0.311 on val2017.

First detr_panoptic_boxes_r50_coco.py, whose last checkpoint is read from where that run leaves it; then

torchrun --nproc-per-node=8 tools/train.py configs/detr/detr_panoptic_r50_coco.py --launcher pytorch
"""
_base_ = "../_base_/coco_panoptic.py"
model = dict(
    type="DetrPanoptic",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),
    backbone=dict(type="ResNet", depth=50, norm="FrozenBN", frozen_stages=2),
    num_classes=133,
    num_things=80,
    freeze_detr=True,
)
load_from = "work_dirs/detr_panoptic_boxes_r50_coco/epoch_300.pth"         # all weights but the mask head's
train_cfg = dict(type="EpochLoop", max_epochs=25, val_interval=5)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = dict(type="MultiStepLR", milestones=(15,), gamma=0.1, begin=0, end=25, by_epoch=True)
