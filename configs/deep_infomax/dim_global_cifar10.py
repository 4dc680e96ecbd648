"""Deep InfoMax, global: the vector shall belong to the whole map, and match the prior; else dim_local_infonce_cifar10.py, and the paper's
weights (arXiv:1808.06670). The paper's tables have it far below the local one. Not measured yet.

VISIONKIT_DATA=where/the/data/is python tools/train.py configs/deep_infomax/dim_global_cifar10.py
"""
_base_ = "dim_local_infonce_cifar10.py"
model = dict(alpha=1.0, beta=0.0, gamma=1.0)
