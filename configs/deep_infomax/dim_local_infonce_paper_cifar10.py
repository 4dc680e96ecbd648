"""Deep InfoMax, local, with InfoNCE on CIFAR-10, the authors' sizes and 1000 epochs of 64 images (arXiv:1808.06670, table 1). 130 GFLOP a
batch. Not measured yet.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deep_infomax/dim_local_infonce_paper_cifar10.py
"""
_base_ = "dim_local_infonce_cifar10.py"
model = dict(score_channels=2048)
train_cfg = dict(_delete_=True, type="EpochLoop", max_epochs=1000, val_interval=50)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10, max_keep_ckpts=3))
log_processor = dict(by_epoch=True)
test_cfg = dict(points=dict(conv3=dict(feature="map2")))                   # 4096 numbers: the paper's `conv`, beside its `fc` and `Y`
