"""NZ layout and lossless compression of sparse-quantized weights for Atlas 300I Duo."""

from slim_compress.__about__ import __version__
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

__all__ = [
    "CompressConfig",
    "Compressed",
    "Compressor",
    "CorruptStreamError",
    "ExecutorError",
    "StreamInfo",
    "UntrustedDataError",
    "VerificationError",
    "__version__",
    "compress",
    "decompress",
    "decompress_tile",
    "entropy_ratio",
    "inspect",
    "nd_to_nz",
    "nz_to_nd",
]
