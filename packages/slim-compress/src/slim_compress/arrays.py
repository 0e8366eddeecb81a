"""Weights of whatever array library as numpy arrays, without importing that library."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError

# 2^31: the format counts rows and columns in 32 bits.
MAX_SIDE = 1 << 31


def to_numpy(name: str, value: Any) -> np.ndarray:
    """Return the array behind a numpy array or a torch tensor (bfloat16 included), not copied.

    Raises
    ------
    InvalidTypeError
        It is neither.
    """
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")  # loaded already if the value is one of its tensors
    if torch is None or not isinstance(value, torch.Tensor):
        raise InvalidTypeError(
            f"{name} must be a torch.Tensor or a numpy array, not {type(value).__name__}"
        )
    tensor = value.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    array = tensor.numpy()
    return array


def to_int8(name: str, value: Any) -> np.ndarray:
    """Return a 2-D int8 array of the same values.

    Parameters
    ----------
    name : str
        For messages.
    value : numpy.ndarray or torch.Tensor
        Of int8, or of any type if each value is a whole number in [-128, 127].

    Raises
    ------
    InvalidValueError
        Not 2-D, empty, longer than 2^31 along a side, or with a value that int8 cannot hold.
    """
    array = to_numpy(name, value)
    if array.ndim != 2:
        raise InvalidValueError(f"{name} must have 2 dimensions, not {array.ndim}")
    if array.size == 0:
        raise InvalidValueError(f"{name} has no elements: its shape is {array.shape}")
    if max(array.shape) > MAX_SIDE:
        raise InvalidValueError(f"{name} has a side above 2^31: its shape is {array.shape}")
    if array.dtype == np.int8:
        return array
    if array.dtype == np.float16 or array.dtype == ml_dtypes.bfloat16:
        raise FormatError(
            f"{name} is {array.dtype}: only int8 weights (W8A8S) are compressed",
            hint="16-bit sparse weights (W16A16S) are not supported",
        )
    return fit(name, array, np.dtype(np.int8))


def fit(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert to an integer dtype if no value changes by it.

    Raises
    ------
    InvalidValueError
        A value does not fit; names the first one.
    """
    if array.dtype.kind not in "biuf":
        raise InvalidTypeError(f"{name} must hold numbers, not {array.dtype}")
    limits = np.iinfo(dtype)
    fits = (array >= limits.min) & (array <= limits.max)
    if array.dtype.kind == "f":
        fits &= array == np.rint(array)
    if not fits.all():
        first = array[~fits].flat[0]
        raise InvalidValueError(f"{name} has the value {first}, which {dtype} cannot hold")
    return array.astype(dtype)
