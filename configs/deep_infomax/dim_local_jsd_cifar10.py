"""Deep InfoMax, local, with the Jensen-Shannon divergence; else dim_local_infonce_cifar10.py (arXiv:1808.06670). A linear probe of conv3,
pooled to 2x2, has 0.486, of random networks 0.446 (three seeds).

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deep_infomax/dim_local_jsd_cifar10.py
"""
_base_ = "dim_local_infonce_cifar10.py"
model = dict(mi_loss=dict(type="FenchelDualLoss", measure="JSD"))
