"""Learning without labels on CIFAR-10 as folders of JPEG files: 32x32, batches of 32, flips and shifts by up to 4 pixels. Validated by how
many puzzles of the test folder are solved, tested by probes of frozen features. A card adds the model, `test_cfg.points`, optimizer and
epochs. Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler"),
    dataset=dict(
        type="ImageFolder",
        data_root="data/cifar10/train/",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomShift", pixels=4),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="ImageFolder",
        data_root="data/cifar10/test/",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="PackSample"),
        ],
    ),
)
val_evaluator = dict(type="PretextAccuracy")
val_cfg = dict(type="ValLoop")
test_dataloader = dict(
    batch_size=100,
    num_workers=1,
    worker_init_fn=dict(type="worker_init"),
    sampler=dict(type="DrawSampler", shuffle=False),
    dataset=dict(
        type="ImageFolder",
        data_root="data/cifar10/test/",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="PackSample"),
        ],
    ),
)
test_cfg = dict(
    type="ProbeLoop",
    train_dataloader=dict(
        batch_size=100,
        num_workers=1,
        worker_init_fn=dict(type="worker_init"),
        sampler=dict(type="DrawSampler", shuffle=False),
        dataset=dict(
            type="ImageFolder",
            data_root="data/cifar10/train/",
            test_mode=True,
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="PackSample"),
            ],
        ),
    ),
    points=dict(),                     # the card's, such as block2=dict(feature="map1", pool=2)
    seeds=(0, 1, 2),                   # of the networks at random initialisation, which are always measured beside
)
test_evaluator = [dict(type="LinearProbe"), dict(type="KNNProbe")]
