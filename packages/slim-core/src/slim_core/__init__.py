"""Foundation of the slim toolkit, free of any deep-learning framework."""

from slim_core.__about__ import __version__

__all__ = ["__version__"]
