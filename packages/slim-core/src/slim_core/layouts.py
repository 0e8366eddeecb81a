"""FRACTAL_NZ, the matrix layout of the Ascend cube unit (ACL format 29).

A matrix is cut into fractals of 16 rows by 32 bytes (32 int8, 16 float16).  Inside a fractal the
elements lie row by row ("Z"), the fractals of the matrix column by column ("N")::

    nz[k1, n1, r, c] = nd[16 * n1 + r, 32 * k1 + c]                           (int8)
    offset(i, j) = ((j // 32) * ceil(n / 16) + i // 16) * 512 + (i % 16) * 32 + j % 32

Rows and columns beyond the matrix are zero.
"""

from __future__ import annotations

import numpy as np

from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError

FRACTAL_ROWS = 16
FRACTAL_ROW_BYTES = 32


def nz_shape(shape: tuple[int, int], itemsize: int = 1) -> tuple[int, int, int, int]:
    """Return the FRACTAL_NZ shape ``(k1, n1, 16, 32 / itemsize)`` of an ``(n, k)`` matrix.

    Raises
    ------
    FormatError
        The matrix is empty, or the item size is not 1, 2 or 4 bytes.
    """
    if itemsize not in (1, 2, 4):
        raise FormatError(f"FRACTAL_NZ holds items of 1, 2 or 4 bytes, not {itemsize}")
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise FormatError(f"FRACTAL_NZ needs at least one row and one column, not {shape}")
    width = FRACTAL_ROW_BYTES // itemsize
    return -(-columns // width), -(-rows // FRACTAL_ROWS), FRACTAL_ROWS, width


def nd_to_nz(weight: np.ndarray) -> np.ndarray:
    """Lay a matrix out in fractals, padded with zeros.

    Parameters
    ----------
    weight : ndarray, shape (n, k)
        Items of 1, 2 or 4 bytes, in any memory layout.

    Returns
    -------
    ndarray, shape (k1, n1, 16, 32 / itemsize)
        C-contiguous; its bytes are the FRACTAL_NZ matrix.

    Raises
    ------
    InvalidTypeError
        Not a numpy array.
    FormatError
        Not a matrix, empty, or with items of another size.
    """
    _check_array("weight", weight)
    if weight.ndim != 2:
        raise FormatError(f"FRACTAL_NZ needs a matrix, not an array of {weight.ndim} dimensions")
    rows, columns = weight.shape
    k1, n1, height, width = nz_shape((rows, columns), weight.dtype.itemsize)
    padded = np.zeros((n1 * height, k1 * width), weight.dtype)
    padded[:rows, :columns] = weight
    return np.ascontiguousarray(padded.reshape(n1, height, k1, width).transpose(2, 0, 1, 3))


def nz_to_nd(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the matrix that fractals hold, without their padding.

    Parameters
    ----------
    data : ndarray
        Of the shape of :func:`nd_to_nz`, or flat.
    shape : tuple of int
        The shape (n, k) of the matrix.

    Returns
    -------
    ndarray, shape (n, k)
        C-contiguous, with memory of its own.

    Raises
    ------
    InvalidTypeError
        Not a numpy array.
    InvalidValueError
        ``shape`` is not two int.
    FormatError
        The number or arrangement of elements is not that of ``shape``.
    """
    _check_array("data", data)
    if len(shape) != 2 or not all(isinstance(length, (int, np.integer)) for length in shape):
        raise InvalidValueError(f"shape must be the two lengths of a matrix, not {shape!r:.80}")
    expected = nz_shape(shape, data.dtype.itemsize)
    if data.shape not in (expected, (np.prod(expected),)):
        raise FormatError(
            f"the FRACTAL_NZ form of {tuple(shape)} has the shape {expected}, not {data.shape}"
        )
    k1, n1, height, width = expected
    padded = data.reshape(expected).transpose(1, 2, 0, 3).reshape(n1 * height, k1 * width)
    matrix: np.ndarray = padded[: shape[0], : shape[1]].copy()
    return matrix


def _check_array(name: str, value: object) -> None:
    if not isinstance(value, np.ndarray):
        raise InvalidTypeError(f"{name} must be a numpy array, not {type(value).__name__}")
