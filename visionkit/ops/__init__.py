"""Tensors in, tensors out: the operations that detectors are made of, with no compiled extension."""
from visionkit.ops.boxes import box_area, box_iou, clip_boxes
from visionkit.ops.nms import batched_nms, nms
from visionkit.ops.roi_align import RoIAlign, pyramid_roi_align, roi_align
from visionkit.ops.rois import boxes_to_rois

__all__ = ["RoIAlign", "batched_nms", "box_area", "box_iou", "boxes_to_rois", "clip_boxes", "nms", "pyramid_roi_align", "roi_align"]
