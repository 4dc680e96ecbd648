"""COCO 2017 as DETR learns from it: many scales, half of the images cropped (arXiv:2005.12872, sec. 4), also those without objects."""
_base_ = "coco_detection.py"
train_dataloader = dict(
    dataset=dict(
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
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
            dict(type="PackSample"),
        ],
    ),
)
