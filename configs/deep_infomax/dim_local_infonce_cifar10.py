"""Deep InfoMax, local, with InfoNCE on CIFAR-10, 2000 batches of 64 images, pairs scored in 256 dimensions instead of 2048: 12 GFLOP a
batch, and the probes (arXiv:1808.06670). A linear probe of conv3, pooled to 2x2, has 0.501, of random networks 0.446 (three seeds).

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deep_infomax/dim_local_infonce_cifar10.py
"""
_base_ = "../_base_/cifar10_pretext.py"
model = dict(
    type="DeepInfoMax",
    backbone=dict(type="StridedConvs", channels=(64, 128, 256)),
    score_channels=256,
    alpha=0.0,
    beta=1.0,
    gamma=0.1,
    mi_loss=dict(type="InfoNCELoss"),
)
train_dataloader = dict(batch_size=64)
train_cfg = dict(type="IterLoop", max_iters=2000, val_interval=500)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr=5e-4, fused=True),                      # the paper's 1e-4 is for some 800,000 batches
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=2000, by_epoch=False, begin=0, end=2000)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
test_cfg = dict(
    points=dict(
        conv2_pooled=dict(feature="map1", pool=2),
        conv3_pooled=dict(feature="map2", pool=2),
        fc=dict(feature="fc"),
        y=dict(feature="y"),
    ),
)
