"""Pascal VOC 2007 + 2012 trainval to train, 2007 test to score: short side 600, long side at most 1000, flips. Run-time defaults."""
_base_ = "runtime.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", scale=(1000, 600), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSample"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="ConcatDataset",
        datasets=[
            dict(type="VOCDataset", data_root="data/VOCdevkit/VOC2007/", ann_file="ImageSets/Main/trainval.txt", pipeline=train_pipeline),
            dict(type="VOCDataset", data_root="data/VOCdevkit/VOC2012/", ann_file="ImageSets/Main/trainval.txt", pipeline=train_pipeline),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="VOCDataset",
        data_root="data/VOCdevkit/VOC2007/",
        ann_file="ImageSets/Main/test.txt",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(1000, 600), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="VOCMetric", iou=(0.5, 0.7), rule="11_points")
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
