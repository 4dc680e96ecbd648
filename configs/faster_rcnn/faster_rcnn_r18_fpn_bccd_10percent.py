"""Faster R-CNN R18-FPN on 20 of BCCD's 205 labelled training images at 320x240, 300 iterations of 4 from scratch. Box AP on the
val split: 0.440, AP50 0.804 (three seeds).

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/faster_rcnn/faster_rcnn_r18_fpn_bccd_10percent.py

The images were drawn once, by Python's random.Random(0).sample(range(205), 20); they hold 236 RBC, 20 WBC and 22 platelets.
"""
_base_ = "faster_rcnn_r18_fpn_bccd.py"
train_dataloader = dict(
    batch_size=4,
    dataset=dict(indices=[10, 24, 35, 55, 66, 72, 77, 91, 98, 103, 107, 122, 124, 129, 130, 149, 158, 193, 194, 200]),
)
train_cfg = dict(_delete_=True, type="IterLoop", max_iters=300, val_interval=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=300, begin=0, end=300, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
log_processor = dict(by_epoch=False)
