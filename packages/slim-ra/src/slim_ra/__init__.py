"""RazorAttention KV-cache compression: head search for RoPE and ALiBi models, and its cache.

The names below are loaded on first use, so that ``import slim_ra`` and the command line's help
do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slim_ra.__about__ import __version__

if TYPE_CHECKING:
    from slim_ra.cache import RazorCache
    from slim_ra.calibrated import calibrated_windows
    from slim_ra.compressor import RACompressor, RARopeCompressor
    from slim_ra.config import RACompressConfig, RARopeCompressConfig
    from slim_ra.policy import RazorPolicy
    from slim_ra.profile import AlibiWindows, RetrievalHeads, read_profile, write_profile
    from slim_ra.runtime import disable, enable, razor
    from slim_ra.scores import HeadScores, search_heads
    from slim_ra.windows import bound_windows, legacy_windows

_HOMES = {
    "AlibiWindows": "profile",
    "HeadScores": "scores",
    "RACompressConfig": "config",
    "RACompressor": "compressor",
    "RARopeCompressConfig": "config",
    "RARopeCompressor": "compressor",
    "RazorCache": "cache",
    "RazorPolicy": "policy",
    "RetrievalHeads": "profile",
    "bound_windows": "windows",
    "calibrated_windows": "calibrated",
    "disable": "runtime",
    "enable": "runtime",
    "legacy_windows": "windows",
    "razor": "runtime",
    "read_profile": "profile",
    "search_heads": "scores",
    "write_profile": "profile",
}

__all__ = [
    "AlibiWindows",
    "HeadScores",
    "RACompressConfig",
    "RACompressor",
    "RARopeCompressConfig",
    "RARopeCompressor",
    "RazorCache",
    "RazorPolicy",
    "RetrievalHeads",
    "__version__",
    "bound_windows",
    "calibrated_windows",
    "disable",
    "enable",
    "legacy_windows",
    "razor",
    "read_profile",
    "search_heads",
    "write_profile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
