"""A control for the same model: every label gets the image of another, drawn at random. Where it is tested with this card, or was
trained with it, accuracy is to be that of chance, 0.10; what is above came from elsewhere than the images. The model that was
trained without it has 0.109, the one that was trained with it 0.0995, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/moonvit/moonvit_tiny_cifar10_native_control.py
or, of a model that is trained already, python tools/test.py with this card and its checkpoint.
"""
_base_ = "moonvit_tiny_cifar10_native.py"
model = dict(data_preprocessor=dict(exchange_images=True))
val_dataloader = dict(sampler=dict(shuffle=True))              # the files are in the order of their classes
test_dataloader = dict(sampler=dict(shuffle=True))
