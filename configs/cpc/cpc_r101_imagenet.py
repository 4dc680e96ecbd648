"""Contrastive predictive coding R101 on ImageNet: 7x7 crops of 64 pixels from 256, third block, five rows ahead (arXiv:1807.03748, sec.
3.3: 48.7 top-1 of a linear classifier). The paper's network is a ResNet-101 v2 without any norm; here is the first version with group
norm, which keeps crops apart as well. Epochs are ours, the paper tells none. Not measured yet.

torchrun --nnodes=4 --nproc-per-node=8 tools/train.py configs/cpc/cpc_r101_imagenet.py --launcher pytorch
"""
_base_ = "../_base_/imagenet_pretext.py"
model = dict(
    type="CPC",
    backbone=dict(type="ResNet", depth=101, norm="GN", out_stages=(4,)),
    puzzle=dict(type="OverlappingCrops", size=64, stride=32, subcrop=60, gray_prob=1.0),
    context="masked_convs",
    context_channels=256,
    context_layers=5,
    rows_ahead=(1, 2, 3, 4, 5),
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 300), keep_ratio=True),
            dict(type="RandomCrop", size=(256, 256)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(100000, 300), keep_ratio=True),
            dict(type="CenterCrop", crop_size=(256, 256)),
            dict(type="PackSample"),
        ],
    ),
)
train_cfg = dict(type="EpochLoop", max_epochs=100, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr=2e-4, fused=True),                      # the paper's, for 16 images on each of 32 GPUs
)
param_scheduler = []
