"""DETR-small learns 16 images of BCCD by heart, at 160x120: a check that it can, not a detector. On these images box
AP 0.945, AP50 0.974, seed 0 (docs/benchmarks.md); 13 minutes on 2 CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/detr/detr_r18_overfit_bccd.py
"""
_base_ = "detr_r18_bccd.py"
model = dict(backbone=dict(out_stages=(5,), strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        indices=16,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(160, 120)),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(                                                     # the same images
    dataset=dict(
        ann_file="train.json",
        indices=16,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(160, 120)),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(type="EpochLoop", max_epochs=600, val_interval=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=600, begin=0, end=600, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=100, max_keep_ckpts=1))
