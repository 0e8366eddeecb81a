"""Types whose codes are places in a table: NormalFloat and the small floating-point types.

Written on the Python array API, as :mod:`slim_core.numerics` is.  A value becomes the nearest
level; half way between two levels the one with the even code is taken, which for floating-point
types is the rounding of IEEE 754.  Values beyond the last level become that level.

On the CPU numpy does the work for every library, in pieces that stay in the cache: its operations
on bytes and bits take a fraction of the time of a search among the levels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from slim_core.dtypes import TableType

Array = Any

_PIECE = 1 << 15  # elements whose temporaries fit into the second level of a cache
_FEW = 16  # bounds that are faster to count than bits are to round


def _float_type(name: str, bits: int, mantissa_bits: int, bias: int, count: int) -> TableType:
    """Return a floating-point type with so many values from 0 on."""
    steps = 1 << mantissa_bits
    levels = []
    for code in range(count):
        exponent, mantissa = divmod(code, steps)
        normal = 1.0 if exponent else 0.0
        levels.append((normal + mantissa / steps) * 2.0 ** (max(exponent, 1) - bias))
    return TableType(name, bits, tuple(levels), mantissa_bits=mantissa_bits, bias=bias)


FP4 = _float_type("fp4_e2m1", 4, 1, 1, 8)
"""OCP FP4 E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

FP8 = _float_type("fp8_e4m3", 8, 3, 7, 127)
"""OCP FP8 E4M3: up to 448, no infinity; the code 127 is NaN and never made."""

NF4 = TableType(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    sign_bit=False,
)
"""4-bit NormalFloat of QLoRA (arXiv:2305.14314): quantiles of a normal distribution in [-1, 1]."""


def encode_table(x: Array, dtype: TableType) -> Array:
    """Return the codes, int8, of the levels nearest to ``x`` (float32, finite)."""
    xp = array_namespace(x)
    if _in_host_memory(x):
        codes = np.empty(x.shape, np.int8)
        flat, out = _as_numpy(x).reshape(-1), codes.reshape(-1)
        for start in range(0, len(flat), _PIECE):
            _encode_piece(flat[start : start + _PIECE], out[start : start + _PIECE], dtype)
        return xp.asarray(codes)
    bounds = xp.asarray(_bounds(dtype), device=device(x))
    flat = xp.reshape(x, (-1,))  # torch wants it contiguous
    magnitude = xp.abs(flat) if dtype.sign_bit else flat
    codes = xp.astype(xp.searchsorted(bounds, magnitude), xp.int8)
    if dtype.sign_bit:
        codes = codes + xp.astype(xp.signbit(flat), xp.int8) * _sign(dtype)
    return xp.reshape(codes, x.shape)


def decode_table(codes: Array, dtype: TableType) -> Array:
    """Return the levels, float32, of codes."""
    xp = array_namespace(codes)
    if _in_host_memory(codes):
        return xp.asarray(_values(dtype)[_as_numpy(codes).view(np.uint8)])
    values = xp.asarray(_values(dtype), device=device(codes))
    places = xp.astype(codes, xp.int32) & 255
    return xp.reshape(xp.take(values, xp.reshape(places, (-1,)), axis=0), codes.shape)


def _in_host_memory(x: Array) -> bool:
    return str(device(x)) == "cpu"


def _as_numpy(x: Array) -> np.ndarray:
    """Return an array in host memory as one of numpy, sharing memory."""
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def _encode_piece(x: np.ndarray, codes: np.ndarray, dtype: TableType) -> None:
    magnitude = np.abs(x) if dtype.sign_bit else x
    bounds = _bounds(dtype)
    if len(bounds) < _FEW:
        codes[:] = magnitude > bounds[0]
        for bound in bounds[1:]:
            codes += magnitude > bound
    else:
        codes[:] = _float_codes(np.minimum(magnitude, np.float32(dtype.max)), dtype)
    if dtype.sign_bit:
        codes += np.signbit(x).view(np.int8) * np.int8(_sign(dtype))


def _float_codes(magnitude: np.ndarray, dtype: TableType) -> np.ndarray:
    """Return the codes of a floating-point type, by rounding the bits of float32."""
    bits = magnitude.view(np.int32)
    drop = 23 - dtype.mantissa_bits
    # Adding just below half of what is dropped, and one more if what is kept is odd, carries where
    # half to even rounds up, into the exponent too.
    normal = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal -= (127 - dtype.bias) << dtype.mantissa_bits
    smallest = np.float32(2.0 ** (1 - dtype.bias))  # with an implicit one; below, steps are equal
    steps = np.rint(magnitude * ((1 << dtype.mantissa_bits) / smallest)).astype(np.int32)
    codes: np.ndarray = np.where(magnitude < smallest, steps, normal)
    return codes


def _sign(dtype: TableType) -> int:
    """Return the bit of the sign as a number that int8 has."""
    return -128 if dtype.bits == 8 else 1 << (dtype.bits - 1)


@lru_cache
def _bounds(dtype: TableType) -> np.ndarray:
    """Return float32 such that the code of ``x`` is the number of them below ``x``."""
    levels = np.array(dtype.levels, np.float64)
    middles = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    odd = np.arange(len(middles)) % 2 == 1  # a middle above an odd code goes up
    bounds: np.ndarray = np.where(odd, np.nextafter(middles, np.float32(-np.inf)), middles)
    return bounds


@lru_cache
def _values(dtype: TableType) -> np.ndarray:
    """Return the float32 value of every byte; those above the bits of the type do not count."""
    levels = np.full(1 << (dtype.bits - dtype.sign_bit), np.nan, np.float32)
    levels[: len(dtype.levels)] = dtype.levels
    values = np.concatenate([levels, -levels]) if dtype.sign_bit else levels
    return np.tile(values, 256 // len(values))
