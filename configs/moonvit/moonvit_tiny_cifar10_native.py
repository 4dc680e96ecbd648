"""A small MoonViT that classifies CIFAR-10 images of random heights and widths, 56 to 112 pixels, packed: 1500 batches of 64
(arXiv:2504.07491, sec. 2.1). Top-1 accuracy on 2,000 test images 0.482, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/moonvit/moonvit_tiny_cifar10_native.py
"""
_base_ = "../_base_/cifar10_native.py"
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(type="NativeResolutionPreprocessor"),
    backbone=dict(type="MoonViT", channels=96, num_layers=4, num_heads=4, hidden_channels=384, position_grid=(8, 8)),
    num_classes=10,
)
train_cfg = dict(type="IterLoop", max_iters=1500, val_interval=300)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=1400, by_epoch=False, begin=100, end=1500),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=300, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
