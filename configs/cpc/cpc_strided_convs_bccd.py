"""Contrastive predictive coding with three small convolutions on photographs of blood cells, 80 epochs of 205 images in 7x7 crops of 32
pixels: 1.4 GFLOP an image, six minutes at 60 GFLOP/s (arXiv:1807.03748, sec. 3.3). Not measured yet.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/cpc/cpc_strided_convs_bccd.py
"""
_base_ = "../_base_/bccd_pretext.py"
model = dict(
    type="CPC",
    backbone=dict(type="StridedConvs", channels=(32, 64, 128)),
    puzzle=dict(type="OverlappingCrops", size=32, stride=16, subcrop=30, gray_prob=0.5),
    context_channels=128,
    context_layers=3,
    rows_ahead=(2, 3, 4),                                                  # the row below shares half of its pixels
)
train_cfg = dict(type="EpochLoop", max_epochs=80, val_interval=20)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=1e-4, fused=True),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=80, begin=0, end=80, convert_to_iter_based=True),
]
