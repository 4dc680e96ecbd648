"""Faster R-CNN R50-FPN on COCO with modulated deformable convolution in C3 to C5 (DCNv2, arXiv:1811.11168), 12 epochs. Not measured here.

torchrun --nproc-per-node=8 tools/train.py configs/faster_rcnn/faster_rcnn_r50_fpn_dcnv2_coco.py --launcher pytorch
"""
_base_ = "faster_rcnn_r50_fpn_coco.py"
model = dict(
    backbone=dict(dcn=dict(type="ModulatedDeformConv2dPack"), stage_with_dcn=(False, True, True, True)),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"conv_offset": dict(lr_mult=0.1)}))            # as in the paper
