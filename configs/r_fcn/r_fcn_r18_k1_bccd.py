"""R-FCN R18 with one bin, so without position-sensitivity, on BCCD at 320x240: the control of r_fcn_r18_bccd.py. Box AP 0.356, AP50 0.772,
AP75 0.254 on the test split, seed 0 (docs/benchmarks.md); 18 minutes on 2 CPU cores.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/r_fcn/r_fcn_r18_k1_bccd.py
"""
_base_ = "r_fcn_r18_bccd.py"
model = dict(roi=dict(bins=1))
