"""Jigsaw R50 on ImageNet, 70 epochs of 8x32 images with eight of 1000 orders each. Tiles, orders and batch are the paper's
(arXiv:1603.09246); the trunk and its schedule are those of rotation_r50_imagenet.py at half the rate. Not measured yet.

torchrun --nproc-per-node=8 tools/train.py configs/jigsaw/jigsaw_r50_imagenet.py --launcher pytorch
"""
_base_ = "../_base_/imagenet_pretext.py"
model = dict(
    type="Jigsaw",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),       # 225 pixels stay 225
    backbone=dict(type="ResNet", depth=50),
    puzzle=dict(type="JigsawTiles", tile=64, num_permutations=1000, per_image=8, grey=0.3),
    head=dict(type="JigsawHead", tile_channels=512, hidden_channels=4096),
)
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 256), keep_ratio=True),
            dict(type="RandomCrop", size=(225, 225)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=32,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 256), keep_ratio=True),
            dict(type="CenterCrop", crop_size=(225, 225)),
            dict(type="PackSample"),
        ],
    ),
)
train_cfg = dict(type="EpochLoop", max_epochs=70, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.0001, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="MultiStepLR", milestones=(30, 50), gamma=0.1, begin=0, end=70, by_epoch=True),
]
