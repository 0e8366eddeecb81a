"""Two 4-bit codes in a byte, the order of every Ascend format.

The low nibble holds the even element and the high nibble the odd one, along the packed axis; the
byte is stored as int8.  Four bytes read as little-endian int32 are what
``npu_convert_weight_to_int4pack`` makes.  A weight ``[o, i]`` is packed along ``axis=-1``
(``[o, i/2]``) for W4A16 per channel, along ``axis=-2`` (``[o/2, i]``) for W4A16 per group and for
W4A8.
"""

from __future__ import annotations

from typing import Any

import array_api_compat

from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError
from slim_core.validate import check_int

Array = Any
"""An array of the array-API standard: numpy, torch, ..."""


def pack_int4(codes: Array, axis: int = -1) -> Array:
    """Pack pairs of neighbours along an axis.

    Parameters
    ----------
    codes : array of integers
        In [-8, 7]; the length of the axis must be even.
    axis : int

    Returns
    -------
    array of int8
        With half the length along ``axis``.

    Raises
    ------
    FormatError
        The length is odd, or a code is out of range.
    InvalidTypeError
        ``codes`` is not an array of integers.
    InvalidValueError
        There is no such axis.
    """
    xp = _namespace("codes", codes)
    if not xp.isdtype(codes.dtype, "integral"):
        raise InvalidTypeError(f"codes must be integers, not {codes.dtype}")
    axis = _check_axis(codes, axis)
    length = codes.shape[axis]
    if length % 2:
        raise FormatError(f"int4 packing needs an even axis; axis {axis} has length {length}")
    if 0 not in codes.shape and (xp.min(codes) < -8 or xp.max(codes) > 7):
        low, high = int(xp.min(codes)), int(xp.max(codes))
        raise FormatError(f"int4 codes must be in [-8, 7], not in [{low}, {high}]")
    codes = xp.astype(codes, xp.int8, copy=False)
    # All of this stays within int8: no overflow, whose result the standard leaves open.
    return (_every_second(codes, axis, 0) & 15) + _every_second(codes, axis, 1) * 16


def unpack_int4(packed: Array, axis: int = -1) -> Array:
    """Return the codes of :func:`pack_int4` as int8, with twice the length along ``axis``.

    Raises
    ------
    InvalidTypeError
        ``packed`` is not an array of int8.
    InvalidValueError
        There is no such axis.
    """
    xp = _namespace("packed", packed)
    if packed.dtype != xp.int8:
        raise InvalidTypeError(f"packed must be int8, not {packed.dtype}")
    axis = _check_axis(packed, axis)
    low = ((packed & 15) ^ 8) - 8
    pairs = xp.stack([low, packed >> 4], axis=axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 2
    return xp.reshape(pairs, tuple(shape))


def _namespace(name: str, value: Any) -> Any:
    try:
        return array_api_compat.array_namespace(value)
    except TypeError:
        raise InvalidTypeError(f"{name} must be an array, not {type(value).__name__}") from None


def _check_axis(array: Array, axis: int) -> int:
    if not array.ndim:
        raise InvalidValueError("int4 packing needs an axis; the array has none")
    return check_int("axis", axis, low=-array.ndim, high=array.ndim - 1) % int(array.ndim)


def _every_second(array: Array, axis: int, first: int) -> Array:
    return array[(slice(None),) * axis + (slice(first, None, 2),)]
