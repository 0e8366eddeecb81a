"""Types whose codes are places in a table: NormalFloat and the small floating-point types.

Written on the Python array API, as :mod:`slim_core.numerics` is.  A value becomes the nearest
level; half way between two levels the one with the even code is taken, which for floating-point
types is the rounding of IEEE 754.  Values beyond the last level become that level.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from slim_core.dtypes import TableType

Array = Any


def _float_levels(exponent_bits: int, mantissa_bits: int, bias: int, count: int) -> list[float]:
    """Return the first values from 0 on of a floating-point type, by their codes."""
    steps = 1 << mantissa_bits
    levels = []
    for code in range(count):
        exponent, mantissa = divmod(code, steps)
        normal = 1.0 if exponent else 0.0
        levels.append((normal + mantissa / steps) * 2.0 ** (max(exponent, 1) - bias))
    return levels


FP4 = TableType("fp4_e2m1", 4, tuple(_float_levels(2, 1, 1, 8)))
"""OCP FP4 E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

FP8 = TableType("fp8_e4m3", 8, tuple(_float_levels(4, 3, 7, 127)))
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
    bounds = xp.asarray(_bounds(dtype), device=device(x))
    flat = xp.reshape(x, (-1,))  # torch wants it contiguous
    magnitude = xp.abs(flat) if dtype.sign_bit else flat
    codes = xp.astype(xp.searchsorted(bounds, magnitude), xp.int8)
    if dtype.sign_bit:
        sign = -128 if dtype.bits == 8 else 1 << (dtype.bits - 1)
        codes = codes + xp.astype(xp.signbit(flat), xp.int8) * sign
    return xp.reshape(codes, x.shape)


def decode_table(codes: Array, dtype: TableType) -> Array:
    """Return the levels, float32, of codes."""
    xp = array_namespace(codes)
    values = xp.asarray(_values(dtype), device=device(codes))
    places = xp.astype(codes, xp.int32) & ((1 << dtype.bits) - 1)
    return xp.reshape(xp.take(values, xp.reshape(places, (-1,)), axis=0), codes.shape)


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
    """Return the float32 value of every code, read as an unsigned number."""
    levels = np.full(1 << (dtype.bits - dtype.sign_bit), np.nan, np.float32)
    levels[: len(dtype.levels)] = dtype.levels
    return np.concatenate([levels, -levels]) if dtype.sign_bit else levels
