"""Faster R-CNN R18-FPN on 20 labelled images of BCCD, its trunk from jigsaw puzzles of all 205 training images without their labels. Box AP
on the val split: 0.434, AP50 0.795 (three seeds); 0.365 after 100 iterations, where random weights have 0.337.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/jigsaw/jigsaw_r18_bccd.py                  # the trunk, first
VISIONKIT_DATA=where/the/data/is python tools/train.py configs/faster_rcnn/faster_rcnn_r18_fpn_bccd_10percent_pretrained.py

Another trunk is named with --cfg-options load_from=FILE. To compare with faster_rcnn_r18_fpn_bccd_10percent.py, from which this differs in
the trunk's first weights only.
"""
_base_ = "faster_rcnn_r18_fpn_bccd_10percent.py"
load_from = "work_dirs/jigsaw_r18_bccd/epoch_30.pth"
load_from_part = "backbone"
