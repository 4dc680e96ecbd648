"""COCO 2017 panoptic, things and stuff, with DETR's augmentation: many scales, half of the images crops (arXiv:2005.12872, sec. 4)."""
_base_ = "coco_detection.py"
train_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_train2017.json",
        data_prefix=dict(img="train2017/", seg="annotations/panoptic_train2017/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations"),
            dict(type="RandomFlip", prob=0.5),
            dict(
                type="RandomChoice",
                transforms=[
                    [],
                    [
                        dict(
                            type="RandomChoice",                           # short side, whatever the long one
                            transforms=[
                                [dict(type="Resize", scale=(100000, 400), keep_ratio=True)],
                                [dict(type="Resize", scale=(100000, 500), keep_ratio=True)],
                                [dict(type="Resize", scale=(100000, 600), keep_ratio=True)],
                            ],
                        ),
                        dict(type="RandomCrop", size=(600, 600), min_size=(384, 384), min_visible=0.0),
                    ],
                ],
            ),
            dict(
                type="RandomChoice",                                       # short side, long side at most 1333
                transforms=[
                    [dict(type="Resize", scale=(1333, 480), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 512), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 544), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 576), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 608), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 640), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 672), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 704), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 736), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 768), keep_ratio=True)],
                    [dict(type="Resize", scale=(1333, 800), keep_ratio=True)],
                ],
            ),
            dict(type="BoxesFromMasks"),
            dict(type="PackSample"),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_val2017.json",
        data_prefix=dict(img="val2017/", seg="annotations/panoptic_val2017/"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations", keep_map=True),
            dict(type="Resize", scale=(1333, 800), keep_ratio=True),
            dict(type="PackSample"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PanopticQuality")
test_evaluator = val_evaluator
