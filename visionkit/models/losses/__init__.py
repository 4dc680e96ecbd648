"""What two architectures share of their losses."""
from visionkit.models.losses.rank_mean import mean_over_ranks
from visionkit.models.losses.set_prediction import SetPredictionLoss

__all__ = ["SetPredictionLoss", "mean_over_ranks"]
