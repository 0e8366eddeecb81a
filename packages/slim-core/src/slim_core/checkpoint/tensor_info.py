"""What the header of a weight file says about a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor.

    Parameters
    ----------
    name : str
    dtype : numpy.dtype
        Of ml_dtypes for bfloat16 and the 8-bit floating-point types.
    shape : tuple of int
    file : Path
        The file that holds it.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in contiguous form."""
        return self.size * self.dtype.itemsize
