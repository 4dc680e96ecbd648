"""Rotation with the paper's network in network on CIFAR-10, 200 epochs of 128 images in four rotations each (arXiv:1803.07728, sec. 3.1:
accuracy 91.16 of a convolutional classifier on the second block, where 92.80 is supervised). Not measured yet.

python tools/train.py configs/rotation/rotation_nin_cifar10.py
"""
_base_ = "../_base_/cifar10_pretext.py"
model = dict(type="Rotation", backbone=dict(type="NIN"))
train_dataloader = dict(batch_size=128)
train_cfg = dict(type="EpochLoop", max_epochs=200, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
)
param_scheduler = [dict(type="MultiStepLR", milestones=(60, 120, 160), gamma=0.2, begin=0, end=200, by_epoch=True)]
test_cfg = dict(
    points=dict(
        block1=dict(feature="map0", pool=2),
        block2=dict(feature="map1", pool=2),
        block3=dict(feature="map2", pool=2),
        block4=dict(feature="map3", pool=2),
    ),
)
