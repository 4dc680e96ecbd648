"""Deformable Faster R-CNN R101 on COCO (Deformable ConvNets, arXiv:1703.06211), two fully connected layers, no pyramid, 16 epochs of
8 images a batch. Not measured here; the authors, who train on the images of train2017 and val2017, have AP 0.350 on test-dev, and 0.303
with nothing deformable.

torchrun --nproc-per-node=8 tools/train.py configs/faster_rcnn/deformable_faster_rcnn_r101_coco.py --launcher pytorch

Each of their 8 epochs shows every image twice, once flipped: these are 16 of ours.
"""
_base_ = "../_base_/coco_detection.py"
model = dict(
    type="FasterRCNN",
    backbone=dict(
        type="ResNet",
        depth=101,
        out_stages=(4, 5),
        frozen_stages=2,
        norm="FrozenBN",
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        dcn=dict(type="DeformConv2dPack", offset_groups=4),
        stage_with_dcn=(False, False, False, True),
        pretrained="torchvision://resnet101",
    ),
    neck=None,
    rpn=dict(
        type="RPN",
        hidden_channels=512,
        anchor_scales=(4, 8, 16, 32),
        matcher=dict(type="IoUMatcher", positive=0.7, negative=0.3, rescue_from=0.01),
        pre_nms=(6000, 6000),
        post_nms=(300, 300),
        smooth_l1_beta=0.1111,                                             # sigma 3
        cross_boundary=False,
    ),
    roi=dict(
        type="RoIBoxHead",
        num_classes=80,
        pooling=dict(type="DeformableRoIPooling", reduced_channels=256),
        matcher=dict(type="IoUMatcher", positive=0.5, negative=0.5, background_from=0.1),
        sampler=dict(type="BalancedSampler", num=128, positive_fraction=0.25),
        smooth_l1_beta=1.0,
        score_threshold=0.001,
        nms=dict(type="nms", iou=0.3),
    ),
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(1000, 600), keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(1000, 600), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(type="EpochLoop", max_epochs=16, val_interval=1)
optim_wrapper = dict(
    type="OptimWrapper",
    # the authors add up the gradients of 4 images where 8 are averaged here: 8 times their rate of 5e-4, and a 4th of their decay
    optimizer=dict(type="SGD", lr=4e-3, momentum=0.9, weight_decay=1.25e-4),
    paramwise_cfg=dict(custom_keys={"roi.pooling.offset": dict(lr_mult=0.01)}),
)
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", milestones=(156363,), gamma=0.1, by_epoch=False),                     # 10.667 epochs of 14,659 iterations
]
