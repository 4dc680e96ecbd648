"""Deep InfoMax, local, with the Jensen-Shannon divergence; else dim_local_infonce_cifar10.py (arXiv:1808.06670). Not measured yet.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deep_infomax/dim_local_jsd_cifar10.py
"""
_base_ = "dim_local_infonce_cifar10.py"
model = dict(mi_loss=dict(type="FenchelDualLoss", measure="JSD"))
