"""Deformable DETR R18 in two stages on BCCD at 320x240, 36 epochs from scratch. Box AP 0.475, AP50 0.773 on the test split, seed 0
(docs/benchmarks.md); 22 minutes on 2 CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deformable_detr/deformable_detr_r18_bccd.py
"""
_base_ = "../_base_/bccd_detection.py"
train_dataloader = dict(batch_size=4)                                      # twice the steps of 8 in the same time
model = dict(
    type="DeformableDETR",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=16),      # 240 rows stay 240
    backbone=dict(type="ResNet", depth=18, out_stages=(3, 4, 5)),
    neck=dict(type="ChannelMapper", out_channels=128),
    num_classes=3,
    num_queries=60,
    encoder_layers=1,                                                      # where most of the transformer's time goes
    decoder_layers=3,
    hidden_channels=256,
    dropout=0.0,
    with_box_refine=True,
    two_stage=True,
)
train_cfg = dict(type="EpochLoop", max_epochs=36, val_interval=12)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, weight_decay=1e-4, fused=True),
    paramwise_cfg=dict(custom_keys={"sampling_offsets": dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=36, begin=0, end=36, convert_to_iter_based=True),
]
