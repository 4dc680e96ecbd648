"""The same model, tested at an aspect ratio and a width beyond any it was trained at: 140x56 pixels, 2.5 to 1, where the most is 112x56,
2 to 1 (arXiv:2504.07491). Top-1 accuracy 0.467, of 0.482 at the sizes it was trained at, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/moonvit/moonvit_tiny_cifar10_native_unseen_aspect.py
or, of a model that is trained already, python tools/test.py with this card and its checkpoint.
"""
_base_ = "moonvit_tiny_cifar10_native.py"
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(140, 56)),
            dict(type="PackSample"),
        ],
    ),
)
