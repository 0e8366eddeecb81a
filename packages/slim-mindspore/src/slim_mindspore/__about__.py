"""Version of the distribution; ``hatch version`` edits it."""

__version__ = "0.1.0"
