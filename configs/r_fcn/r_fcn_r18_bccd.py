"""R-FCN R18 with 3x3 bins on BCCD at 320x240, 30 epochs from scratch. Box AP 0.497, AP50 0.888, AP75 0.533 on the test split, seed 0
(docs/benchmarks.md); 18 minutes on 2 CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/r_fcn/r_fcn_r18_bccd.py
"""
_base_ = "../_base_/bccd_detection.py"
model = dict(
    type="RFCN",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=16),      # 240 rows stay 240
    # C4 at stride 8 for both stages: a platelet of 20 pixels is then two feature pixels wide, a red cell six
    backbone=dict(type="ResNet", depth=18, out_stages=(4,), strides=(1, 2, 1, 1), dilations=(1, 1, 2, 1)),
    rpn=dict(type="RPN", anchor_scales=(2.5, 6.5, 12), anchor_ratios=(1.0,), post_nms=(200, 100)),
    roi=dict(
        type="PositionSensitiveHead",
        num_classes=3,
        bins=3,
        hidden_channels=256,
        hidden_std=None,                                                   # from scratch
        nms=dict(type="nms", iou=0.5),                                     # cells lie close together
        score_threshold=0.01,                                              # the table counts the tail of the ranking too
    ),
)
train_cfg = dict(type="EpochLoop", max_epochs=30, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=30, begin=0, end=30, convert_to_iter_based=True),
]
