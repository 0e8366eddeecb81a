"""Function-preserving edits of a block that make it easier to quantize."""

from slim_ptq.transforms.apply import scale_link, scaled
from slim_ptq.transforms.collect import LinkStatistics
from slim_ptq.transforms.smooth import SmoothQuant, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats
from slim_ptq.transforms.suppress import (
    ScaleMethod,
    SuppressedLink,
    smoothed_norms,
    suppress_block,
)
from slim_ptq.transforms.threshold import ThresholdSmooth

__all__ = [
    "ChannelStats",
    "LinkStatistics",
    "ScaleMethod",
    "SmoothQuant",
    "SuppressedLink",
    "ThresholdSmooth",
    "scale_link",
    "scaled",
    "smooth_scales",
    "smoothed_norms",
    "suppress_block",
]
