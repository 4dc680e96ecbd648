"""Classification of CIFAR-10 as folders of JPEG files, each image scaled to a height and a width of its own, 56, 84 or 112 pixels, in
training as in validation and test. Batches of 64, flips and shifts by up to 4 pixels. A card adds the model, optimizer and iterations.
Run-time defaults."""
_base_ = "runtime.py"
train_dataloader = dict(
    batch_size=64,
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
            dict(type="RandomNativeResize", multiple=28, low=56, high=112),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
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
            dict(type="RandomNativeResize", multiple=28, low=56, high=112),
            dict(type="PackSample"),
        ],
    ),
)
val_evaluator = dict(type="Accuracy")
val_cfg = dict(type="ValLoop")
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict(type="TestLoop")
