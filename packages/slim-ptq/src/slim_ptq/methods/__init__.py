"""Methods that turn a float weight into codes, each a pure function in a file of its own."""

from slim_ptq.methods.minmax import quantize_minmax, relative_error

__all__ = ["quantize_minmax", "relative_error"]
