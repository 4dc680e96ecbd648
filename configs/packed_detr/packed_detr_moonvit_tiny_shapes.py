"""DETR on the packed tokens of a small MoonViT: generated shapes on scenes of 96 to 192 pixels a side, every batch of mixed sizes and
aspects, no padding mask anywhere (arXiv:2005.12872, arXiv:2504.07491). One epoch is too little for a DETR from nothing, AP50 0.010;
packed_detr_moonvit_tiny_overfit_shapes.py shows that it learns.

python tools/train.py configs/packed_detr/packed_detr_moonvit_tiny_shapes.py
"""
_base_ = "../_base_/runtime.py"
model = dict(
    type="PackedDETR",
    data_preprocessor=dict(type="NativeResolutionPreprocessor", multiple=16),
    backbone=dict(
        type="MoonViT",
        patch_size=8,
        channels=128,
        num_layers=4,
        num_heads=4,
        hidden_channels=512,
        position_grid=(16, 16),
        position_std=0.02,                                     # it learns from nothing
    ),
    neck=dict(type="MLPProjector", out_channels=128),
    num_classes=4,
    num_queries=25,
    channels=128,
    num_heads=4,
    hidden_channels=512,
    encoder_layers=2,
    decoder_layers=3,
    dropout=0.0,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="ShapesDataset",
        num_images=16000,
        seed=0,
        size=(128, 128),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomNativeResize", multiple=16, low=96, high=192),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="ShapesDataset",
        num_images=200,
        seed=1,                        # other scenes than those trained on
        size=(128, 128),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomNativeResize", multiple=16, low=96, high=192),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric")
test_evaluator = val_evaluator
train_cfg = dict(type="EpochLoop", max_epochs=1, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=1, begin=0, end=1, convert_to_iter_based=True),
]
