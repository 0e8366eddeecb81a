"""Low-rank decomposition of Linear, Embedding and Conv layers that keeps quality."""

from slim_lowrank.__about__ import __version__

__all__ = ["__version__"]
