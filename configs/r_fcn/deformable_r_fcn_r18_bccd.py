"""Deformable R-FCN R18 with 3x3 bins on BCCD at 320x240: C4 and the pooling of r_fcn_r18_bccd.py made deformable. Box AP 0.558, AP50
0.903, AP75 0.628 on the test split, seed 0 (docs/benchmarks.md); 46 minutes on 2 CPU cores without AVX-512.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/r_fcn/deformable_r_fcn_r18_bccd.py
"""
_base_ = "r_fcn_r18_bccd.py"
model = dict(
    backbone=dict(dcn=dict(type="DeformConv2dPack", offset_groups=4), stage_with_dcn=(False, False, True, False)),
    roi=dict(deformable=True),
)
