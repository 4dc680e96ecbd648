"""R-FCN R101 on COCO, 16 epochs of 8 images a batch, the recipe of the Deformable ConvNets release (arXiv:1703.06211). Not measured here;
the authors, who train on the images of train2017 and val2017, have AP 0.321, AP50 0.543 on test-dev.

torchrun --nproc-per-node=8 tools/train.py configs/r_fcn/r_fcn_r101_coco.py --launcher pytorch

Each of their 8 epochs shows every image twice, once flipped: these are 16 of ours.
"""
_base_ = "../_base_/coco_detection.py"
model = dict(
    type="RFCN",
    backbone=dict(
        type="ResNet",
        depth=101,
        out_stages=(4, 5),
        frozen_stages=2,
        norm="FrozenBN",
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        pretrained="torchvision://resnet101",
    ),
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
    roi=dict(type="PositionSensitiveHead", num_classes=80, score_threshold=0.001),
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
    # the authors add up the gradients of 8 images where they are averaged here: 8 times their rate of 5e-4, and an 8th of their decay
    optimizer=dict(type="SGD", lr=4e-3, momentum=0.9, weight_decay=6.25e-5),
    paramwise_cfg=dict(custom_keys={"roi.conv_new": dict(lr_mult=3.0)}),
)
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", milestones=(156363,), gamma=0.1, by_epoch=False),                     # 10.667 epochs of 14,659 iterations
]
