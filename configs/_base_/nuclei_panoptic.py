"""Nuclei: 160 microscope images, each nucleus a thing, the rest one stuff class; at most 256x256, flips, 4 images a batch. Run-time
defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="CocoInstancesAsPanoptic",
        data_root="data/nuclei/",
        ann_file="train.json",
        data_prefix=dict(img="images/"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations"),
            dict(type="Resize", scale=(256, 256), keep_ratio=True),
            dict(type="RandomFlip", prob=(0.25, 0.25, 0.25), direction=("horizontal", "vertical", "diagonal")),
            dict(type="BoxesFromMasks"),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="CocoInstancesAsPanoptic",
        data_root="data/nuclei/",
        ann_file="val.json",
        data_prefix=dict(img="images/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations", keep_map=True),
            dict(type="Resize", scale=(256, 256), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type="PanopticQuality"), dict(type="CocoMetric")]
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
