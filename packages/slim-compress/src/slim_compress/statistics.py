"""How far a weight could be compressed at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_compress import _native
from slim_compress.arrays import to_int8


def entropy_ratio(matrix: Any, *, name: str = "matrix") -> float:
    """Return the order-0 entropy of the values over 8 bits: the limit for coding each by itself.

    Parameters
    ----------
    matrix : numpy.ndarray or torch.Tensor
        (n, k), int8.
    """
    counts = _native.histogram(to_int8(name, matrix))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() / 8)
