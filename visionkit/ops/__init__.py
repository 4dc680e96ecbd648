"""Tensors in, tensors out: the operations that detectors are made of, with no compiled extension."""
from visionkit.ops.attention import (
    Attention,
    EfficientAttention,
    FlashAttention,
    LinearAttention,
    attention,
    efficient_attention,
    flash_attention,
    linear_attention,
    varlen_attention,
    varlen_linear_attention,
)
from visionkit.ops.boxes import (
    box_area,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    elementwise_box_iou,
    elementwise_generalized_box_iou,
    generalized_box_iou,
    xyxy_to_cxcywh,
)
from visionkit.ops.deform_conv import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d
from visionkit.ops.deform_roi_pool import DeformPSRoIPool, DeformRoIPool, deform_ps_roi_pool, deform_roi_pool
from visionkit.ops.detections import NMS, BoxVoting, SoftNMS, detections_from_scores
from visionkit.ops.focal_loss import SigmoidFocalLoss, sigmoid_focal_loss
from visionkit.ops.ms_deform_attention import MSDeformAttn, ms_deform_attn
from visionkit.ops.nms import batched_nms, nms
from visionkit.ops.ps_roi_align import PSRoIAlign, ps_roi_align
from visionkit.ops.ps_roi_pool import PSRoIPool, ps_roi_pool
from visionkit.ops.roi_align import RoIAlign, pyramid_roi_align, roi_align
from visionkit.ops.roi_pool import RoIPool, roi_pool
from visionkit.ops.rois import boxes_to_rois
from visionkit.ops.soft_nms import batched_soft_nms, soft_nms

__all__ = [
    "Attention",
    "BoxVoting",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "EfficientAttention",
    "FlashAttention",
    "LinearAttention",
    "MSDeformAttn",
    "ModulatedDeformConv2dPack",
    "NMS",
    "PSRoIAlign",
    "PSRoIPool",
    "RoIAlign",
    "RoIPool",
    "SigmoidFocalLoss",
    "SoftNMS",
    "attention",
    "batched_nms",
    "batched_soft_nms",
    "box_area",
    "box_iou",
    "boxes_to_rois",
    "clip_boxes",
    "cxcywh_to_xyxy",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "detections_from_scores",
    "efficient_attention",
    "elementwise_box_iou",
    "elementwise_generalized_box_iou",
    "flash_attention",
    "generalized_box_iou",
    "linear_attention",
    "ms_deform_attn",
    "nms",
    "ps_roi_align",
    "ps_roi_pool",
    "pyramid_roi_align",
    "roi_align",
    "roi_pool",
    "sigmoid_focal_loss",
    "soft_nms",
    "varlen_attention",
    "varlen_linear_attention",
    "xyxy_to_cxcywh",
]
