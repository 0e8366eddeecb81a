"""Rank rules: how large a factor may be, and when factors stop paying.

All functions work on shapes alone.  A matrix has the shape ``(rows, columns)``; a convolution
kernel has the shape ``(out, in, *kernel)``.
"""

from __future__ import annotations

import math

from slim_core.errors import InvalidValueError
from slim_core.validate import check_float, check_int


def round_to(value: float, divisor: int) -> int:
    """Round half up to a multiple of ``divisor``, never below it, never over 10 % down.

    Parameters
    ----------
    value : float
        The rank asked for.
    divisor : int
        At least 1.  Matrix units work in tiles, so ranks off their grid waste them.
    """
    check_int("divisor", divisor, low=1)
    rounded = max(divisor, math.floor((value + divisor / 2) / divisor) * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def check_ratio(name: str, value: object) -> float:
    """Require a share of parameters strictly between 0 and 1."""
    ratio = check_float(name, value)
    if not 0.0 < ratio < 1.0:
        raise InvalidValueError(f"{name} must lie strictly between 0 and 1, not {ratio}")
    return ratio


def matrix_params(rank: int, rows: int, columns: int) -> int:
    """Return the number of weights of a factor pair ``(rows, rank) (rank, columns)``."""
    return rank * (rows + columns)


def matrix_rank(ratio: float, rows: int, columns: int) -> int:
    """Return the rank at which a factor pair keeps ``ratio`` of the weights, rounded down."""
    return int(ratio * rows * columns / (rows + columns))


def matrix_pays(rank: int, rows: int, columns: int) -> bool:
    """Whether the factor pair has fewer weights than the matrix."""
    return matrix_params(rank, rows, columns) < rows * columns


def conv_params(ranks: tuple[int, int], shape: tuple[int, ...]) -> int:
    """Return the number of weights of a Tucker-2 triple at ``ranks = (out, in)``."""
    rank_out, rank_in = ranks
    out, inp, taps = shape[0], shape[1], math.prod(shape[2:])
    return rank_in * inp + rank_in * rank_out * taps + rank_out * out


def conv_rank(ratio: float, shape: tuple[int, ...]) -> float:
    """Return the common Tucker-2 rank of both channel modes that keeps ``ratio`` of the weights.

    It is the positive root of ``taps r^2 + (in + out) r - ratio taps in out = 0`` with ``taps`` the
    product of the real kernel sizes, so kernels need not be square.
    """
    channels, taps = shape[0] + shape[1], math.prod(shape[2:])
    dense = ratio * taps * shape[0] * shape[1]
    return (math.sqrt(channels**2 + 4 * taps * dense) - channels) / (2 * taps)


def conv_pays(ranks: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether the Tucker-2 triple has fewer weights than the kernel."""
    return conv_params(ranks, shape) < math.prod(shape)


def clamp_conv_ranks(ranks: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Cut ``(out, in)`` ranks to the channel counts: more cannot carry information."""
    return min(ranks[0], shape[0]), min(ranks[1], shape[1])


def form_params(form: str, ranks: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the number of weights of a layer in one of its decomposed forms.

    Parameters
    ----------
    form : str
        ``factors`` or ``pivot`` of a matrix; ``out``, ``in``, ``spatial`` or ``tucker2`` of a
        kernel (see :mod:`slim_lowrank.conv_forms`).
    ranks : tuple of int
        One rank, or ``(out, in)`` for ``tucker2``.
    shape : tuple of int
        Shape of the dense weight, ``(out, in, *kernel)``.
    """
    if form == "tucker2":
        return conv_params((ranks[0], ranks[1]), shape)
    rank, out, inp, taps = ranks[0], shape[0], shape[1], math.prod(shape[2:])
    if form == "in":
        return rank * (inp + taps * out)
    if form == "spatial":
        return rank * (inp * shape[2] + out * shape[3])
    saved = rank * rank if form == "pivot" else 0
    return rank * (inp * taps + out) - saved
