"""Deformable DETR R50 with iterative box refinement on COCO, 50 epochs, 32 images a batch (arXiv:2010.04159: box AP 45.4 on val2017).
Not measured here.

torchrun --nproc-per-node=8 tools/train.py configs/deformable_detr/deformable_detr_refine_r50_coco.py --launcher pytorch
"""
_base_ = "deformable_detr_r50_coco.py"
model = dict(with_box_refine=True)
