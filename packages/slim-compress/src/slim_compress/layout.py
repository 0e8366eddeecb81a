"""FRACTAL_NZ by native code, the layout that the matrix unit of Ascend reads int8 weights in.

A matrix of (n, k) is padded with zeros to multiples of 16 rows and 32 columns, cut into fractals of
16 x 32, and stored as (k1, n1, 16, 32): the fractals column by column, each row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_compress import _native
from slim_compress.arrays import to_int8
from slim_core.layouts import nz_to_nd
from slim_core.validate import check_int

__all__ = ["nd_to_nz", "nz_to_nd", "round_up"]


def round_up(value: int, block: int) -> int:
    """Return the smallest multiple of ``block`` that is not below ``value``."""
    check_int("value", value, low=0)
    check_int("block", block, low=1)
    return -(-value // block) * block


def nd_to_nz(matrix: Any, *, name: str = "matrix") -> np.ndarray:
    """Return a matrix in FRACTAL_NZ.

    Parameters
    ----------
    matrix : numpy.ndarray or torch.Tensor
        (n, k), int8 or whole numbers that int8 can hold; need not be contiguous.

    Returns
    -------
    numpy.ndarray
        int8, (ceil(k / 32), ceil(n / 16), 16, 32).

    Raises
    ------
    InvalidTypeError, InvalidValueError
        ``matrix`` is not such a matrix.
    """
    return _native.nd_to_nz(to_int8(name, matrix))
