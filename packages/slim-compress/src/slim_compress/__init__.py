"""NZ layout and lossless compression of sparse-quantized weights for Atlas 300I Duo."""

from slim_compress.__about__ import __version__

__all__ = ["__version__"]
