"""Faster R-CNN with StarterNet on generated shapes: shows that the plugin trains, not how well. Two minutes on a laptop.

python tools/train.py starter_shapes.py
"""
model = dict(
    type="FasterRCNN",
    backbone=dict(type="StarterNet", width=16, downsample=dict(type="BlurPool")),
    neck=dict(type="FPN", out_channels=64, num_levels=4),
    rpn=dict(type="RPN", anchor_scales=(4,), pre_nms=(500, 300), post_nms=(300, 100)),
    roi=dict(type="RoIBoxHead", num_classes=4, hidden_channels=(256, 256)),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="ShapesDataset",
        num_images=800,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomTranslate", max_fraction=0.2),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="ShapesDataset",
        num_images=80,
        seed=1,
        test_mode=True,
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSample")],
    ),
)
val_evaluator = dict(type="CocoMetric")
train_cfg = dict(type="EpochLoop", max_epochs=2, val_interval=1)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-4, weight_decay=1e-4), clip_grad=dict(max_norm=10))
