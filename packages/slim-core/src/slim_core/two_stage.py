"""Two-stage weights: 8 bits for each row, and 4 bits within them for each group.

Progressive group quantization of QServe (arXiv:2405.04532).  The first stage keeps to -119 ... 119,
so that the integers ``q2 * s2`` of the second fit into int8::

    s1 = max|W| / 119 of the row        q1 = round(W / s1)
    s2 = round(max|q1| / 7) of the group, at least 1        q2 = clamp(round(q1 / s2), -8, 7)
    W ~ (q2 * s2) * s1
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from slim_core.dtypes import INT4, INT8
from slim_core.numerics import EPS, dequantize_weight, quantize, split_groups

Array = Any

SECOND_SCALE = "weight_scale_second"  # name of ``s2`` among the tensors of a layer

LARGEST_GROUP_SCALE = 17  # of ``s2``, so that ``7 * s2`` is within the first stage

_PROTECTED = LARGEST_GROUP_SCALE * INT4.max


def two_stage_scales(weight: Array, group_size: int) -> tuple[Array, Array]:
    """Return the scales of both stages.

    Parameters
    ----------
    weight : array, float32, shape (out, in)

    Returns
    -------
    row_scale : array, float32, shape (out, 1)
        Never below the float32 machine epsilon.
    group_scale : array, float32, shape (out, in / group_size)
        Integers from 1 to 17.

    Raises
    ------
    FormatError
        The group size does not divide the number of input channels.
    """
    xp = array_namespace(weight)
    peak = xp.max(xp.abs(weight), axis=1, keepdims=True)
    row_scale = xp.maximum(peak / _PROTECTED, xp.full_like(peak, EPS))
    groups = split_groups(_first_stage(weight, row_scale), group_size)
    most = xp.astype(xp.max(xp.abs(groups), axis=2), xp.float32)
    return row_scale, xp.maximum(xp.round(most / INT4.max), xp.ones_like(most))


def quantize_two_stage(weight: Array, row_scale: Array, group_scale: Array) -> Array:
    """Return int8 codes, shape (out, in), for the scales of :func:`two_stage_scales`."""
    xp = array_namespace(weight)
    groups = split_groups(_first_stage(weight, row_scale), weight.shape[1] // group_scale.shape[1])
    codes = quantize(xp.astype(groups, xp.float32), group_scale[..., None], None, INT4)
    return xp.reshape(codes, weight.shape)


def two_stage_integers(codes: Array, group_scale: Array) -> Array:
    """Return ``q2 * s2``, integers in float32, shape (out, in)."""
    return dequantize_weight(codes, group_scale, None)


def _first_stage(weight: Array, row_scale: Array) -> Array:
    return quantize(weight, row_scale, None, INT8)
