"""R-FCN R50 on VOC 07+12 (arXiv:1605.06409), 110,000 iterations of 2 images. Not measured here; the authors have AP50 0.774 on VOC07 test,
0.770 to 0.779 in five runs.

python tools/train.py configs/r_fcn/r_fcn_r50_voc.py
"""
_base_ = "r_fcn_r101_voc.py"
model = dict(backbone=dict(depth=50, pretrained="torchvision://resnet50"))
