"""BCCD without its labels: half of the side, as the detectors see it, squares of 224 pixels; batches of 16 and flips. Validated on val by
the puzzles solved. Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=16,
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
            dict(type="Resize", scale=(320, 240)),
            dict(type="RandomCrop", size=(224, 224)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=29,
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
            dict(type="Resize", scale=(320, 240)),
            dict(type="CenterCrop", crop_size=(224, 224)),
            dict(type="PackSample"),
        ],
    ),
)
val_evaluator = dict(type="PretextAccuracy")
val_cfg = dict(type="ValLoop")
