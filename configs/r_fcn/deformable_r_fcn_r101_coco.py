"""Deformable R-FCN R101 on COCO (Deformable ConvNets, arXiv:1703.06211), 16 epochs of 8 images a batch. Not measured here; the authors
have AP 0.357, AP50 0.568 on test-dev, where R-FCN has 0.321 and 0.543.

torchrun --nproc-per-node=8 tools/train.py configs/r_fcn/deformable_r_fcn_r101_coco.py --launcher pytorch
"""
_base_ = "r_fcn_r101_coco.py"
model = dict(
    backbone=dict(dcn=dict(type="DeformConv2dPack", offset_groups=4), stage_with_dcn=(False, False, False, True)),
    roi=dict(deformable=True),
)
