"""Learning how the weights of a decoder block are rounded, block after block."""

from slim_ptq.rounding.stream import RoundedStream
from slim_ptq.rounding.train import Start, train_rounding

__all__ = ["RoundedStream", "Start", "train_rounding"]
