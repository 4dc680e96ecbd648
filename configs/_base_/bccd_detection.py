"""BCCD: 364 photographs of blood cells, 3 classes, at half size; batches of 8 and flips. Validated on val, tested on test.
Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root="data/bccd/",
        ann_file="train.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("RBC", "WBC", "Platelets")),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(320, 240)),
            dict(type="RandomFlip", prob=0.5),
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
        type="CocoDataset",
        data_root="data/bccd/",
        ann_file="val.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("RBC", "WBC", "Platelets")),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(320, 240)),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root="data/bccd/",
        ann_file="test.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("RBC", "WBC", "Platelets")),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(320, 240)),
            dict(type="PackSample"),
        ],
    ),
)
val_evaluator = dict(type="CocoMetric")
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
