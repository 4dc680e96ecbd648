"""R-FCN R101 on VOC 07+12 (arXiv:1605.06409), 110,000 iterations of 2 images. Not measured here; the authors have AP50 0.795 on VOC07 test.

python tools/train.py configs/r_fcn/r_fcn_r101_voc.py

The authors start from Caffe's ResNet, which has its strides in the first 1x1 of a stage (stride_in_1x1=True); this card from torchvision's,
and learns proposals together with the rest, as their later code does.
"""
_base_ = "../_base_/voc_detection.py"
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
        anchor_scales=(8, 16, 32),
        matcher=dict(type="IoUMatcher", positive=0.7, negative=0.3, rescue_from=0.01),
        pre_nms=(6000, 6000),
        post_nms=(300, 300),
        smooth_l1_beta=0.1111,                                             # sigma 3
        cross_boundary=False,
    ),
    roi=dict(type="PositionSensitiveHead", num_classes=20, score_threshold=0.001, max_per_image=400),
)
train_cfg = dict(type="IterLoop", max_iters=110000, val_interval=10000)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=1e-3, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(bias_lr_mult=2),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(80000,), gamma=0.1, begin=0, end=110000, by_epoch=False)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
log_processor = dict(by_epoch=False)
