"""Function-preserving edits of a block that make it easier to quantize."""

from slim_ptq.transforms.alpha_search import AlphaSearch
from slim_ptq.transforms.apply import scale_link, scaled
from slim_ptq.transforms.awq import AwqScale, BlockAwq
from slim_ptq.transforms.base import ALL_LINKS, NORMS, Reader, ScaleMethod
from slim_ptq.transforms.biases import add_bias, added_biases, has_added_bias
from slim_ptq.transforms.block_error import BlockData, BlockError
from slim_ptq.transforms.cbq import CbqSmooth
from slim_ptq.transforms.choice import scale_method
from slim_ptq.transforms.choose import SkippedLink, choose_links
from slim_ptq.transforms.collect import LinkStatistics
from slim_ptq.transforms.flex import FlexSmooth
from slim_ptq.transforms.smooth import IterativeSmooth, SmoothQuant, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats
from slim_ptq.transforms.suppress import (
    SuppressedLink,
    smoothed_norms,
    suppress_block,
    wrapped_norms,
)
from slim_ptq.transforms.threshold import ThresholdSmooth

__all__ = [
    "ALL_LINKS",
    "NORMS",
    "AlphaSearch",
    "AwqScale",
    "BlockAwq",
    "BlockData",
    "BlockError",
    "CbqSmooth",
    "ChannelStats",
    "FlexSmooth",
    "IterativeSmooth",
    "LinkStatistics",
    "Reader",
    "ScaleMethod",
    "SkippedLink",
    "SmoothQuant",
    "SuppressedLink",
    "ThresholdSmooth",
    "add_bias",
    "added_biases",
    "choose_links",
    "has_added_bias",
    "scale_link",
    "scale_method",
    "scaled",
    "smooth_scales",
    "smoothed_norms",
    "suppress_block",
    "wrapped_norms",
]
