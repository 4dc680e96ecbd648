"""What two architectures share of their losses."""
from visionkit.models.losses.contrastive import (
    DonskerVaradhanLoss,
    FenchelDualLoss,
    InfoNCELoss,
    NoiseContrastiveLoss,
    info_nce,
    info_nce_bound,
)
from visionkit.models.losses.rank_mean import mean_over_ranks
from visionkit.models.losses.set_prediction import SetPredictionLoss

__all__ = ["DonskerVaradhanLoss", "FenchelDualLoss", "InfoNCELoss", "NoiseContrastiveLoss", "SetPredictionLoss", "info_nce",
           "info_nce_bound", "mean_over_ranks"]
