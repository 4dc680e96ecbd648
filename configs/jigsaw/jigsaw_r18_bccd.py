"""Jigsaw R18 on photographs of blood cells, 30 epochs of 205 images with eight of 100 orders each (arXiv:1603.09246, which has 1000 on
ImageNet). 8 GFLOP an image. 0.549 of the orders are right on val, 0.010 by chance, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/jigsaw/jigsaw_r18_bccd.py
"""
_base_ = "../_base_/bccd_pretext.py"
model = dict(
    type="Jigsaw",
    backbone=dict(type="ResNet", depth=18),                                # all stages, so that a detector can start from them
    puzzle=dict(type="JigsawTiles", tile=64, num_permutations=100, per_image=8, grey=0.3),
    pool=2,                                                                # where in a tile a cell is cut
    head=dict(type="JigsawHead", tile_channels=128, hidden_channels=512, dropout=0.1),
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
