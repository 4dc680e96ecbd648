"""Relative patch location R18 on photographs of blood cells, 30 epochs of 205 images, colours as they are: what chromatic aberration is
worth shows beside relative_patch_r18_drop_bccd.py (arXiv:1505.05192, sec. 3.1). 6 GFLOP an image. 0.757 of the
patches of val are placed right, 0.125 by chance, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/relative_patch/relative_patch_r18_bccd.py
"""
_base_ = "../_base_/bccd_pretext.py"
model = dict(
    type="RelativePatch",
    backbone=dict(type="ResNet", depth=18),                                # all stages, so that a detector can start from them
    puzzle=dict(type="PatchGrid", patch=56, gap=22, jitter=4, color=None),
    # in 390 iterations the paper's momentum of 0.003 would not bring the norm's statistics up to date
    head=dict(type="RelativePatchHead", hidden_channels=512, norm_momentum=0.1),
)
train_cfg = dict(type="EpochLoop", max_epochs=30, val_interval=10)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=1e-4, fused=True),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=30, begin=0, end=30, convert_to_iter_based=True),
]
