"""Learning how the weights of a decoder block are rounded, block after block."""

from slim_ptq.rounding.linear import Start
from slim_ptq.rounding.stream import RoundedStream
from slim_ptq.rounding.train import train_rounding

__all__ = ["RoundedStream", "Start", "train_rounding"]
