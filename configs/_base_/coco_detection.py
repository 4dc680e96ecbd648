"""COCO 2017: short side 800, long side at most 1333, flips; 2 images a GPU. Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root="data/coco/",
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(1333, 800), keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root="data/coco/",
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(1333, 800), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric")
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
