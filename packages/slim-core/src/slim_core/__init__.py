"""Framework-free foundation of the slim toolkit: schemes, numerics, layouts, checkpoints, formats, reports."""

from slim_core.__about__ import __version__

__all__ = ["__version__"]
