"""Rotation R50 on ImageNet, 70 epochs of 8x16 images in four rotations each, with MMSelfSup's schedule (arXiv:1803.07728). Not measured
yet.

torchrun --nproc-per-node=8 tools/train.py configs/rotation/rotation_r50_imagenet.py --launcher pytorch
"""
_base_ = "../_base_/imagenet_pretext.py"
model = dict(type="Rotation", backbone=dict(type="ResNet", depth=50))
train_cfg = dict(type="EpochLoop", max_epochs=70, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.0001, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="MultiStepLR", milestones=(30, 50), gamma=0.1, begin=0, end=70, by_epoch=True),
]
