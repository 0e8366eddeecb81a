"""Codes of weights as the Ascend layouts store them, and scales of powers of two."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from slim_core.errors import FormatError
from slim_core.formats.layout import groups_in_row, packed_axis
from slim_core.packing import pack_int4, unpack_int4
from slim_core.scheme import QuantScheme
from slim_core.tables import FP4, FP8, NF4

_E8M0_BIAS = 127


def store_codes(codes: np.ndarray, scheme: QuantScheme, *, packed: bool) -> np.ndarray:
    """Return the stored form of int8 codes of shape (out, in).

    * integers: int8, two in a byte where the layout packs them (:mod:`slim_core.packing`)
    * NF4: flat uint8, the even element in the **high** nibble
    * FP4: uint8 (out, in / 2), the even column in the low nibble
    * FP8: float8_e4m3fn (out, in)
    """
    dtype = None if scheme.weight is None else scheme.weight.dtype
    if dtype == NF4:
        pairs = codes.reshape(-1, 2).astype(np.uint8)
        return pairs[:, 0] << 4 | pairs[:, 1]
    if dtype == FP8:
        return np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn)
    if dtype == FP4:
        return np.asarray(pack_int4((codes ^ 8) - 8)).view(np.uint8)
    axis = packed_axis(scheme, groups_in_row(scheme, codes.shape[1]), packed=packed)
    return codes if axis is None else np.asarray(pack_int4(codes, axis))


def load_codes(
    stored: np.ndarray, scheme: QuantScheme, shape: tuple[int, int], *, packed: bool
) -> np.ndarray:
    """Return the int8 codes, shape (out, in), of what :func:`store_codes` returned."""
    dtype = None if scheme.weight is None else scheme.weight.dtype
    if dtype == NF4:
        return np.stack([stored >> 4, stored & 15], axis=1).astype(np.int8).reshape(shape)
    if dtype == FP8:
        return np.ascontiguousarray(stored).view(np.int8)
    if dtype == FP4:
        return np.asarray(unpack_int4(stored.view(np.int8))) & 15
    axis = packed_axis(scheme, groups_in_row(scheme, shape[1]), packed=packed)
    return stored if axis is None else np.asarray(unpack_int4(stored, axis))


def stored_shape(
    name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], *, packed: bool
) -> tuple[int, int]:
    """Return the shape (out, in) of the weight of a stored layer.

    Raises
    ------
    FormatError
        There is no weight, or it has the wrong number of dimensions.
    """
    stored = tensors.get("weight")
    if stored is None:
        raise FormatError(f"{name} has no weight; its tensors are {', '.join(sorted(tensors))}")
    dtype = None if scheme.weight is None else scheme.weight.dtype
    if dtype == NF4:
        shape = tensors.get("weight_shape")
        if shape is None or shape.shape != (2,) or stored.size * 2 != int(np.prod(shape)):
            raise FormatError(f"{name}.weight_shape must be there and the shape of the weight")
        return int(shape[0]), int(shape[1])
    if stored.ndim != 2:
        raise FormatError(f"{name}.weight must have two dimensions, not shape {stored.shape}")
    lengths = list(stored.shape)
    scale = tensors.get("weight_scale")
    groups = 1 if scale is None or not scale.ndim else scale.shape[-1]
    axis = -1 if dtype == FP4 else packed_axis(scheme, groups, packed=packed)
    if axis is not None:
        lengths[axis] *= 2
    return lengths[0], lengths[1]


def store_power(scale: np.ndarray) -> np.ndarray:
    """Return float32 powers of two as E8M0: the exponent plus 127 in uint8."""
    exponent: np.ndarray = np.frexp(scale)[1] - 1
    return (exponent + _E8M0_BIAS).astype(np.uint8)


def load_power(stored: np.ndarray) -> np.ndarray:
    """Return the float32 powers of two of E8M0; the code 255 is NaN."""
    power: np.ndarray = np.ldexp(np.float32(1), stored.astype(np.int32) - _E8M0_BIAS)
    return np.where(stored == 255, np.float32(np.nan), power)
