"""Relative patch location R50 on ImageNet, 70 epochs of 8x64 images, patches and schedule of MMSelfSup, with the paper's colour dropping
and resampling (arXiv:1505.05192). Not measured yet.

torchrun --nproc-per-node=8 tools/train.py configs/relative_patch/relative_patch_r50_imagenet.py --launcher pytorch
"""
_base_ = "../_base_/imagenet_pretext.py"
model = dict(
    type="RelativePatch",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),       # 255 pixels stay 255
    backbone=dict(type="ResNet", depth=50),
    puzzle=dict(type="PatchGrid", patch=64, gap=21, jitter=10, color="drop"),
    head=dict(type="RelativePatchHead", hidden_channels=4096),
)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 292), keep_ratio=True),
            dict(type="RandomCrop", size=(255, 255)),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 292), keep_ratio=True),
            dict(type="CenterCrop", crop_size=(255, 255)),
            dict(type="PackSample"),
        ],
    ),
)
train_cfg = dict(type="EpochLoop", max_epochs=70, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"head": dict(decay_mult=5.0)}),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(30, 50), gamma=0.1, begin=0, end=70, by_epoch=True)]
