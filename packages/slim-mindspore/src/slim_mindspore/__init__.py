"""Quantization and low-rank decomposition of MindSpore networks."""

from slim_mindspore.__about__ import __version__

__all__ = ["__version__"]
