"""Faster R-CNN R18-FPN on 20 labelled images of BCCD, its trunk from jigsaw puzzles of all 205 training images without their labels. Box AP
on the val split: not measured yet, nor is what the trunk costs; the detector is planned for 8 minutes on 2 CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/faster_rcnn/faster_rcnn_r18_fpn_bccd_10percent_pretrained.py

Another trunk is named with --cfg-options load_from=FILE. To compare with faster_rcnn_r18_fpn_bccd_10percent.py, from which this differs in
the trunk's first weights only.
"""
_base_ = "faster_rcnn_r18_fpn_bccd_10percent.py"
load_from = "work_dirs/jigsaw_r18_bccd/epoch_30.pth"
load_from_part = "backbone"
