"""ImageNet without its labels, a folder a class: windows of 224 pixels and flips, 16 images a process. Validated by the puzzles solved.
Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="ImageFolder",
        data_root="data/imagenet/",
        data_prefix=dict(img="train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", size=224),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=8,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="ImageFolder",
        data_root="data/imagenet/",
        data_prefix=dict(img="val"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 256), keep_ratio=True),
            dict(type="CenterCrop", crop_size=(224, 224)),
            dict(type="PackSample"),
        ],
    ),
)
val_evaluator = dict(type="PretextAccuracy")
val_cfg = dict(type="ValLoop")
