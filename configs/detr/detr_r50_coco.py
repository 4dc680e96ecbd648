"""DETR R50 on COCO, 500 epochs of 16 images a batch (arXiv:2005.12872: box AP 42.0 on val2017). Not measured here.

torchrun --nproc-per-node=8 tools/train.py configs/detr/detr_r50_coco.py --launcher pytorch

The published weights have a row for each of COCO's 91 category numbers; `tools/convert_checkpoint.py --classes coco80` takes those of the
80 categories.
"""
_base_ = "../_base_/coco_detr.py"
model = dict(
    type="DETR",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),
    backbone=dict(type="ResNet", depth=50, norm="FrozenBN", frozen_stages=2, out_stages=(5,), pretrained="torchvision://resnet50"),
    num_classes=80,
    num_queries=100,
    inner_dropout=0.1,                                                     # as in the authors' code
)
train_cfg = dict(type="EpochLoop", max_epochs=500, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(400,), gamma=0.1, begin=0, end=500, by_epoch=True)]
