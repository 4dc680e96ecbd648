"""Features to features. A neck has `out_channels` and `strides` as a backbone has."""
from visionkit.models.necks.channel_mapper import ChannelMapper
from visionkit.models.necks.fpn import FPN
from visionkit.models.necks.mlp_projector import MLPProjector

__all__ = ["FPN", "ChannelMapper", "MLPProjector"]
