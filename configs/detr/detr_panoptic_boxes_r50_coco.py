"""Panoptic DETR R50 on COCO, first stage of two: DETR on boxes around things and stuff, 300 epochs of 16 images a batch
(arXiv:2005.12872, sec. 4.4). Not measured here. detr_panoptic_r50_coco.py is the second stage.

torchrun --nproc-per-node=8 tools/train.py configs/detr/detr_panoptic_boxes_r50_coco.py --launcher pytorch
"""
_base_ = "../_base_/coco_panoptic.py"
model = dict(
    type="DETR",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),
    backbone=dict(type="ResNet", depth=50, norm="FrozenBN", frozen_stages=2, pretrained="torchvision://resnet50"),
    num_classes=133,
    inner_dropout=0.1,                                                     # as in the authors' code
)
val_evaluator = dict(type="CocoMetric")
test_evaluator = val_evaluator
train_cfg = dict(type="EpochLoop", max_epochs=300, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = dict(type="MultiStepLR", milestones=(200,), gamma=0.1, begin=0, end=300, by_epoch=True)
