"""Kronecker-factored transforms of the input of a layer (FlatQuant, arXiv:2410.09426).

An input vector of ``n = a * b`` channels is read as an ``a`` by ``b`` matrix ``X`` and becomes
``L.T @ X @ R``; the stored weight of the layer has the inverse transform in it.
"""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace, device

from slim_core.errors import FormatError
from slim_core.validate import check_int

Array = Any


def kronecker_pair(channels: int) -> tuple[int, int]:
    """Return the factors ``(a, b)`` into which engines split so many channels.

    Fermat's factorization: the smallest ``r`` whose ``r**2 - n`` is a square ``c**2`` gives
    ``a = r - c`` and ``b = r + c``.

    Raises
    ------
    FormatError
        There is no such pair: the number is even and no multiple of 4.

    >>> kronecker_pair(128)
    (8, 16)
    """
    check_int("channels", channels, low=1)
    if channels % 4 == 2:
        raise FormatError(f"{channels} channels have no two factors that are both odd or both even")
    middle = math.isqrt(channels - 1) + 1
    while (half := math.isqrt(middle * middle - channels)) ** 2 != middle * middle - channels:
        middle += 1
    return middle - half, middle + half


def identity_transforms(channels: int, like: Array) -> dict[str, Array]:
    """Return transforms that change nothing, and a clip ratio that clips nothing.

    Parameters
    ----------
    like : array
        Of the library and on the device that the float32 result is to have.
    """
    xp = array_namespace(like)
    place = {"dtype": xp.float32, "device": device(like)}
    left, right = kronecker_pair(channels)
    return {
        "left_trans": xp.eye(left, **place),
        "right_trans": xp.eye(right, **place),
        "clip_ratio": xp.ones(1, **place),
    }


def transform_input(x: Array, left: Array, right: Array) -> Array:
    """Return ``L.T @ X @ R`` for every vector of the last axis.

    Parameters
    ----------
    x : array, shape (..., a * b)
    left : array, shape (a, a)
    right : array, shape (b, b)
    """
    return _both_sides(left.T, x, right)


def restore_weight(weight: Array, left: Array, right: Array) -> Array:
    """Return the weight that does to ``x`` what ``weight`` does to the transformed ``x``.

    Parameters
    ----------
    weight : array, shape (out, a * b)
    """
    return _both_sides(left, weight, right.T)


def _both_sides(left: Array, x: Array, right: Array) -> Array:
    xp = array_namespace(left, x, right)
    matrix = xp.reshape(x, (*x.shape[:-1], left.shape[0], right.shape[0]))
    return xp.reshape(left @ matrix @ right, x.shape)
