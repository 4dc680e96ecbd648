"""Panoptic DETR R18 on 120 microscope images at 256x256, boxes and masks trained together from scratch. It does
not converge in 24 epochs: PQ 0.294 on the 40 val images, things 0.041, stuff 0.546, seed 0 (docs/benchmarks.md), where a map of nothing
but background has 0.417, things 0, stuff 0.835. 1440 iterations of 1.3 s on 2 slow CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/detr/detr_panoptic_r18_nuclei.py
"""
_base_ = "../_base_/nuclei_panoptic.py"
model = dict(
    type="DetrPanoptic",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=16),
    backbone=dict(
        type="ResNet",
        depth=18,
        strides=(1, 2, 2, 1),                                              # a nucleus is 16 pixels wide
        dilations=(1, 1, 1, 2),
        zero_init_residual=False,
    ),
    num_classes=2,
    num_things=1,
    num_queries=150,                                                       # an image has up to 118 segments
    channels=128,
    num_heads=8,
    hidden_channels=512,
    encoder_layers=2,
    decoder_layers=4,
    dropout=0.0,
    dice_weight=5.0,                                                       # small masks would long stay empty
    maps_gain=4096.0,                                                      # 8 heads of 16x16 positions, and a little more
    panoptic_threshold=0.5,
)
train_dataloader = dict(batch_size=2)                                      # twice the steps for the same images
train_cfg = dict(type="EpochLoop", max_epochs=24, val_interval=8)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=24, begin=0, end=24, convert_to_iter_based=True),
]
custom_hooks = [dict(type="PictureHook")]
