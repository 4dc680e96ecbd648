"""Faster R-CNN R50-FPN on COCO, 12 epochs, 16 images a batch. Not measured yet.

torchrun --nproc-per-node=8 tools/train.py configs/faster_rcnn/faster_rcnn_r50_fpn_coco.py --launcher pytorch
"""
_base_ = "../_base_/coco_detection.py"
model = dict(
    type="FasterRCNN",
    backbone=dict(type="ResNet", depth=50, norm="FrozenBN", frozen_stages=2, pretrained="torchvision://resnet50"),
    neck=dict(type="FPN", out_channels=256, num_levels=5),
    rpn=dict(type="RPN", anchor_scales=(8,)),
    roi=dict(type="RoIBoxHead", num_classes=80),
)
train_cfg = dict(type="EpochLoop", max_epochs=12, val_interval=1)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", milestones=(8, 11), gamma=0.1, begin=0, end=12, by_epoch=True),
]
