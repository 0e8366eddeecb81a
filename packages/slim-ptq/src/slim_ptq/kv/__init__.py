"""The int8 key-value cache (C8): where it is filled from, its ranges, and its emulation."""

from slim_ptq.kv.cache_quantizer import CacheQuantizer, attach, quantizers
from slim_ptq.kv.ranges import CacheRanges, cache_scheme
from slim_ptq.kv.rotated_keys import RotatedKeys, only_attention
from slim_ptq.kv.sources import CacheSource, find_cache_sources

__all__ = [
    "CacheQuantizer",
    "CacheRanges",
    "CacheSource",
    "RotatedKeys",
    "attach",
    "cache_scheme",
    "find_cache_sources",
    "only_attention",
    "quantizers",
]
