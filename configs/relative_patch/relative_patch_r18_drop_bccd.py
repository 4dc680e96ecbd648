"""Relative patch location R18 on photographs of blood cells with two of three colours dropped from each patch, so that chromatic aberration
does not give its place away (arXiv:1505.05192, sec. 3.1); else relative_patch_r18_bccd.py. 0.453 of the
patches of val are placed right, 0.757 with the colours, 0.125 by chance, seed 0.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/relative_patch/relative_patch_r18_drop_bccd.py
"""
_base_ = "relative_patch_r18_bccd.py"
model = dict(puzzle=dict(color="drop"))
