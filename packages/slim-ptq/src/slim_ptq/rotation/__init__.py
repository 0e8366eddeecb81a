"""Rotations of the residual stream that leave a model as it is and spread its outliers."""

from slim_ptq.orthogonal import Orthogonal
from slim_ptq.rotation.rotate import rotate_checkpoint

__all__ = ["Orthogonal", "rotate_checkpoint"]
