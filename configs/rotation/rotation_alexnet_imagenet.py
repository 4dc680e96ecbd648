"""Rotation with AlexNet on ImageNet, 50 epochs of 192 images in four rotations each (arXiv:1803.07728, sec. 3.2: linear classifiers
on conv1 to conv5 get 18.8, 31.7, 38.7, 38.2, 36.5), with one linear layer on conv5 where the paper has AlexNet's fully connected ones.
Not measured here.

python tools/train.py configs/rotation/rotation_alexnet_imagenet.py
"""
_base_ = "../_base_/imagenet_pretext.py"
model = dict(type="Rotation", backbone=dict(type="AlexNet"))
train_dataloader = dict(batch_size=192)
train_cfg = dict(type="EpochLoop", max_epochs=50, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(15, 30, 45), gamma=0.1, begin=0, end=50, by_epoch=True)]
