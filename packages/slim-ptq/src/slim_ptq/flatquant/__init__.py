"""Learned transforms of the inputs of linear layers (FlatQuant, arXiv:2410.09426)."""

from slim_ptq.flatquant.model import train_model
from slim_ptq.flatquant.train import train_block

__all__ = ["train_block", "train_model"]
