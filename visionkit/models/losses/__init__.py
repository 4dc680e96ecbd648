"""What two architectures share of their losses."""
from visionkit.models.losses.rank_mean import mean_over_ranks

__all__ = ["mean_over_ranks"]
