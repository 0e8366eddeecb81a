"""NZ layout and lossless compression of sparse-quantized weights for Atlas 300I Duo."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slim_compress.__about__ import __version__

if TYPE_CHECKING:
    from slim_compress.checkpoint import (
        CompressedCheckpoint,
        compress_checkpoint,
        decompress_checkpoint,
        open_compressed,
        verify_checkpoint,
    )
    from slim_compress.codec import (
        Compressed,
        StreamInfo,
        compress,
        decompress,
        decompress_tile,
        inspect,
    )
    from slim_compress.compressor import Compressor
    from slim_compress.config import CompressConfig
    from slim_compress.errors import (
        CorruptStreamError,
        ExecutorError,
        UntrustedDataError,
        VerificationError,
    )
    from slim_compress.layout import nd_to_nz, nz_to_nd
    from slim_compress.statistics import entropy_ratio

# Loaded when first used: the command line answers --help without numpy.
_MODULE_OF = {
    "CompressConfig": "config",
    "Compressed": "codec",
    "CompressedCheckpoint": "checkpoint",
    "Compressor": "compressor",
    "CorruptStreamError": "errors",
    "ExecutorError": "errors",
    "StreamInfo": "codec",
    "UntrustedDataError": "errors",
    "VerificationError": "errors",
    "compress": "codec",
    "compress_checkpoint": "checkpoint",
    "decompress": "codec",
    "decompress_checkpoint": "checkpoint",
    "decompress_tile": "codec",
    "entropy_ratio": "statistics",
    "inspect": "codec",
    "nd_to_nz": "layout",
    "nz_to_nd": "layout",
    "open_compressed": "checkpoint",
    "verify_checkpoint": "checkpoint",
}

__all__ = [
    "CompressConfig",
    "Compressed",
    "CompressedCheckpoint",
    "Compressor",
    "CorruptStreamError",
    "ExecutorError",
    "StreamInfo",
    "UntrustedDataError",
    "VerificationError",
    "__version__",
    "compress",
    "compress_checkpoint",
    "decompress",
    "decompress_checkpoint",
    "decompress_tile",
    "entropy_ratio",
    "inspect",
    "nd_to_nz",
    "nz_to_nd",
    "open_compressed",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
