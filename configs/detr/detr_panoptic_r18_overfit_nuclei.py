"""Panoptic DETR R18 learns 16 microscope images of 5 to 20 nuclei by heart, at 128x128: a check that it can, not a measure of what it
finds in others. Not measured yet.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/detr/detr_panoptic_r18_overfit_nuclei.py
"""
_base_ = "detr_panoptic_r18_nuclei.py"
model = dict(num_queries=40)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        indices=[1, 3, 4, 8, 9, 10, 15, 16, 17, 29, 31, 35, 36, 38, 39, 44],
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations"),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="BoxesFromMasks"),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(                                                     # the same images
    dataset=dict(
        ann_file="train.json",
        indices=[1, 3, 4, 8, 9, 10, 15, 16, 17, 29, 31, 35, 36, 38, 39, 44],
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations", keep_map=True),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(type="EpochLoop", max_epochs=600, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=600, begin=0, end=600, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=200, max_keep_ckpts=1))
