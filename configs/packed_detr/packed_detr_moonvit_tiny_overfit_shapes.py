"""The same detector learns 16 scenes by heart, each at other sizes and aspects whenever it is seen, always several in a batch: a check
that it can, not a detector. On these scenes AP 0.650, AP50 0.713, seed 0 (docs/benchmarks.md).

python tools/train.py configs/packed_detr/packed_detr_moonvit_tiny_overfit_shapes.py
"""
_base_ = "packed_detr_moonvit_tiny_shapes.py"
train_dataloader = dict(dataset=dict(num_images=16))
val_dataloader = dict(dataset=dict(num_images=16, seed=0))     # the same scenes
test_dataloader = dict(dataset=dict(num_images=16, seed=0))
train_cfg = dict(type="EpochLoop", max_epochs=600, val_interval=100)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=600, begin=0, end=600, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=100, max_keep_ckpts=1))
