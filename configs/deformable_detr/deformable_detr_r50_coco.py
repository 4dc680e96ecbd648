"""Deformable DETR R50 on COCO, 50 epochs, 32 images a batch (arXiv:2010.04159: box AP 43.8 on val2017). Not measured here.

torchrun --nproc-per-node=8 tools/train.py configs/deformable_detr/deformable_detr_r50_coco.py --launcher pytorch
"""
_base_ = "../_base_/coco_detr.py"
train_dataloader = dict(batch_size=4)
model = dict(
    type="DeformableDETR",
    data_preprocessor=dict(type="ImagePreprocessor", pad_divisor=1),
    backbone=dict(type="ResNet", depth=50, norm="FrozenBN", frozen_stages=2, out_stages=(3, 4, 5), pretrained="torchvision://resnet50"),
    neck=dict(type="ChannelMapper", out_channels=256, num_levels=4),
    num_classes=80,
    num_queries=300,
)
train_cfg = dict(type="EpochLoop", max_epochs=50, val_interval=5)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4),
    paramwise_cfg=dict(
        custom_keys={
            "backbone": dict(lr_mult=0.1),
            "sampling_offsets": dict(lr_mult=0.1),
            "reference_points": dict(lr_mult=0.1),
        },
    ),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(40,), gamma=0.1, begin=0, end=50, by_epoch=True)]
