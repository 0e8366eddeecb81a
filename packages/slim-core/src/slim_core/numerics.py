"""The quantization formulas, in one place.

Written on the Python array API, so that numpy and torch arrays go through the same operations in
the same order and give the same integers.  Rounding is half to even, divisions are true divisions,
and everything is computed in float32 unless a docstring says otherwise.

Symbols: ``s`` scale, ``z`` offset (an integer held in floating point), ``q`` integer code;
``q = clamp(round(x / s + z))`` and ``x = (q - z) * s``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace, size

from slim_core.dtypes import INT8, CodeType, IntType, TableType
from slim_core.errors import FormatError, InvalidTypeError, NumericalError
from slim_core.scheme import Granularity, ScaleKind, TensorScheme
from slim_core.tables import decode_table, encode_table

EPS = 1.1920928955078125e-07  # machine epsilon of float32: the smallest scale
_WIDENED = 1 << 20  # codes: int32 copies of more are needless

Array = Any  # numpy.ndarray or torch.Tensor; the array API has no nominal type


def lowest_code(scheme: TensorScheme) -> int:
    """Return the smallest code of weights with an integer type, ``-2**(b-1)``.

    Two kinds of symmetric weights end one code earlier, as far from 0 as the largest code: those of
    8 bits, as other tools for Ascend store them and where one code of 256 gains nothing; and
    two-stage ones, whose product of -8 and the largest scale of a group, 17, int8 does not hold
    (:mod:`slim_core.two_stage`).
    """
    dtype = scheme.dtype
    if not isinstance(dtype, IntType):
        raise InvalidTypeError(f"codes of {dtype} are places in a table, not integers")
    ends_early = dtype.bits == INT8.bits or scheme.scales is ScaleKind.TWO_STAGE
    return -dtype.max if scheme.symmetric and ends_early else dtype.min


def affine_params(
    low: Array, high: Array, scheme: TensorScheme, *, full_range: bool = False
) -> tuple[Array, Array]:
    """Return scale and offset for values between ``low`` and ``high``.

    Parameters
    ----------
    low, high : array, float32, any shape
        Smallest and largest value of each set of elements that share a scale.
    full_range : bool
        Let the codes of symmetric integers span the range, -2**(b-1) too: ``2**(b-1) - 1/2``
        instead of the largest code divides the largest magnitude.

    Returns
    -------
    scale, offset : array, float32, same shape
        Symmetric: ``s = max(|low|, |high|) / (2**(b-1) - 1)``, the last being the largest level of
        types with a table; ``z = 0``.  Asymmetric, for integers: the range is widened to hold 0,
        ``s = (high - low) / (2**b - 1)``, ``z = round(-low / s) - 2**(b-1)``.  The scale is never
        below the float32 machine epsilon.  Powers of two are :func:`power_scale` instead.
    """
    xp = array_namespace(low, high)
    dtype = scheme.dtype
    zero = xp.zeros_like(low)
    eps = xp.full_like(low, EPS)
    if scheme.symmetric or isinstance(dtype, TableType):
        peak = xp.maximum(xp.abs(low), xp.abs(high))
        if scheme.scales is ScaleKind.E8M0:
            return power_scale(peak, dtype.max), zero
        largest: float = dtype.max
        if full_range and isinstance(dtype, IntType):
            largest = (dtype.max - dtype.min) / 2
        return xp.maximum(peak / largest, eps), zero
    low, high = xp.minimum(low, zero), xp.maximum(high, zero)
    scale = xp.maximum((high - low) / (dtype.max - dtype.min), eps)
    return scale, xp.round(-low / scale) + dtype.min


def power_scale(peak: Array, largest: float) -> Array:
    """Return the shared scale of the OCP microscaling formats, float32 of the shape of ``peak``.

    ``2**(floor(log2(peak)) - floor(log2(largest)))``, ``largest`` being the largest level of the
    type: elements above it become it.  At least ``2**-126``, which a group of zeros has.
    """
    xp = array_namespace(peak)
    exponent = xp.frexp(peak)[1] - math.frexp(largest)[1]
    exponent = xp.where(peak > 0, exponent, xp.full_like(exponent, -126))
    return xp.ldexp(xp.ones_like(peak), xp.clip(exponent, -126, 127))


def quantize(
    x: Array, scale: Array, offset: Array | None, dtype: CodeType, *, low: int | None = None
) -> Array:
    """Return ``clamp(round(x / scale + offset))`` as int8.

    ``scale`` and ``offset`` broadcast against ``x``.  The clamp is to the range of ``dtype``, or
    from ``low`` on (:func:`lowest_code` of weights).  For a type with a table
    the code is that of the level nearest to ``x / scale``.
    """
    xp = array_namespace(x)
    scaled = x / scale
    if isinstance(dtype, TableType):
        return encode_table(scaled, dtype)
    if offset is not None:
        scaled = scaled + offset
    codes = xp.clip(xp.round(scaled), dtype.min if low is None else low, dtype.max)
    return xp.astype(codes, xp.int8)


def dequantize(codes: Array, scale: Array, offset: Array | None, dtype: CodeType = INT8) -> Array:
    """Return ``(codes - offset) * scale`` in the dtype of ``scale``.

    For a type with a table, ``level * scale``.
    """
    xp = array_namespace(codes, scale)
    if isinstance(dtype, TableType):
        return decode_table(codes, dtype) * scale
    values = xp.astype(codes, scale.dtype)
    return (values if offset is None else values - offset) * scale


def weight_params(
    weight: Array, scheme: TensorScheme, *, full_range: bool = False
) -> tuple[Array, Array]:
    """Return min-max scale and offset of a weight.

    Parameters
    ----------
    weight : array, float32, shape (out, in)
    full_range : bool
        See :func:`affine_params`.

    Returns
    -------
    scale, offset : array, float32
        Shape (out, 1) per channel, (out, in / group_size) per group, (1,) per tensor,
        (out * in / group_size,) per block.

    Raises
    ------
    FormatError
        The group size does not divide the number of input channels, or of elements.
    """
    xp = array_namespace(weight)
    if scheme.granularity is Granularity.PER_BLOCK:
        blocks = split_groups(xp.reshape(weight, (1, -1)), scheme.group_size)[0]
        low, high = xp.min(blocks, axis=1), xp.max(blocks, axis=1)
    elif scheme.granularity is Granularity.PER_TENSOR:
        low, high = (xp.reshape(end, (1,)) for end in (xp.min(weight), xp.max(weight)))
    elif scheme.granularity is Granularity.PER_CHANNEL:
        low, high = xp.min(weight, axis=1, keepdims=True), xp.max(weight, axis=1, keepdims=True)
    else:
        grouped = split_groups(weight, scheme.group_size)
        low, high = xp.min(grouped, axis=2), xp.max(grouped, axis=2)
    return affine_params(low, high, scheme, full_range=full_range)


def quantize_weight(
    weight: Array, scale: Array, offset: Array, scheme: TensorScheme, *, full_range: bool = False
) -> Array:
    """Return int8 codes, shape (out, in), for parameters shaped as :func:`weight_params` does.

    They are those from :func:`lowest_code` on, or all of the type for the ``full_range``.
    """
    low = None if full_range or not isinstance(scheme.dtype, IntType) else lowest_code(scheme)
    offset = None if scheme.symmetric else offset
    xp = array_namespace(weight)
    if scheme.granularity is Granularity.PER_BLOCK:
        blocks = xp.reshape(weight, (scale.shape[0], -1))
        return xp.reshape(
            quantize(blocks, scale[:, None], offset, scheme.dtype, low=low), weight.shape
        )
    if scheme.granularity is not Granularity.PER_GROUP:
        return quantize(weight, scale, offset, scheme.dtype, low=low)
    grouped = split_groups(weight, scheme.group_size)
    offset = None if offset is None else offset[..., None]
    return xp.reshape(
        quantize(grouped, scale[..., None], offset, scheme.dtype, low=low), weight.shape
    )


def dequantize_weight(
    codes: Array, scale: Array, offset: Array | None, dtype: CodeType = INT8
) -> Array:
    """Return the float weight, shape (out, in), of codes and parameters of any granularity."""
    xp = array_namespace(codes, scale)
    if scale.ndim < 2:  # of the whole, or of its blocks
        split = xp.reshape(codes, (scale.shape[0], -1))
    elif scale.shape[1] == 1:
        return dequantize(codes, scale, offset, dtype)
    else:
        split = split_groups(codes, codes.shape[1] // scale.shape[1])
    offset = None if offset is None else offset[..., None]
    return xp.reshape(dequantize(split, scale[..., None], offset, dtype), codes.shape)


def quantize_per_token(
    x: Array, dtype: CodeType, clip_ratio: Array | float = 1.0
) -> tuple[Array, Array]:
    """Quantize an activation symmetrically with one scale for each vector of the last axis.

    Parameters
    ----------
    clip_ratio : array of shape (1,), or float
        In (0, 1]: share of the largest magnitude that the codes reach; what is beyond is clamped.

    Returns
    -------
    codes : array, int8, shape of x
    scale : array, float32, shape of x with a last axis of 1
        ``s = clip_ratio * max|x| / (2**(b-1) - 1)``, the last being the largest level of types
        with a table.
    """
    xp = array_namespace(x)
    peak = xp.max(xp.abs(x), axis=-1, keepdims=True) * clip_ratio
    scale = xp.maximum(peak / dtype.max, xp.full_like(peak, EPS))
    return quantize(x, scale, None, dtype), scale


def fold_static(
    codes: Array, weight_scale: Array, input_scale: Array, input_offset: Array, bias: Array | None
) -> tuple[Array, Array]:
    """Return the scale and the integer bias that turn integer products into outputs.

    ``y = (q_x @ codes.T + quant_bias) * deq_scale`` for ``q_x = round(x / s_x + z_x)``.

    Parameters
    ----------
    codes : array, int8, shape (out, in)
    weight_scale : array, float32, shape (out, 1) or (1,)
    input_scale, input_offset : array, float32, shape (1,)
    bias : array, float32, shape (out,), or None

    Returns
    -------
    deq_scale : array, float32, shape (out,) or (1,)
        ``s_x * s_w``, formed in float32 also for float16 models, where the product would lose
        bits to subnormal numbers.
    quant_bias : array, int32, shape (out,)
        ``round(bias / deq_scale - z_x * sum_i codes[:, i])``, computed in float64 since the sum
        can have more digits than float32 holds.
    """
    xp = array_namespace(codes, weight_scale)
    deq_scale = input_scale * xp.reshape(weight_scale, (-1,))
    row_sum = xp.astype(_row_sums(codes), xp.float64)
    value = -xp.astype(input_offset, xp.float64) * row_sum
    if bias is not None:
        value = value + xp.astype(bias, xp.float64) / xp.astype(deq_scale, xp.float64)
    limit = 2**31 - 1
    return deq_scale, xp.astype(xp.clip(xp.round(value), -limit - 1, limit), xp.int32)


def _row_sums(codes: Array) -> Array:
    """Return the sums of rows, int32, which 2**24 codes fit, some rows widened at a time."""
    xp = array_namespace(codes)
    step = max(1, _WIDENED // max(1, codes.shape[1]))
    parts = (codes[start : start + step] for start in range(0, codes.shape[0], step))
    return xp.concat([xp.sum(part, axis=1, dtype=xp.int32) for part in parts])


def unfold_scale(deq_scale: Array, input_scale: Array) -> Array:
    """Return a ``weight_scale``, shape of ``deq_scale``, that folds to exactly this ``deq_scale``.

    The inverse of the product in :func:`fold_static`, for layers that store no weight scale.  Just
    below a power of two the float32 quotient can be one place too small; then the next number is
    returned.
    """
    xp = array_namespace(deq_scale, input_scale)
    quotient = deq_scale / input_scale
    above = xp.nextafter(quotient, xp.full_like(quotient, float("inf")))
    return xp.where(quotient * input_scale == deq_scale, quotient, above)


def check_finite(name: str, what: str, x: Array) -> None:
    """Require that every element is finite.

    Raises
    ------
    NumericalError
        Names the layer, what it is and how many elements are not finite.
    """
    xp = array_namespace(x)
    # One pass without a temporary: NaN and infinity survive a sum.  A sum of finite elements that
    # overflows is looked at element by element; numpy would warn of it.
    with np.errstate(over="ignore", invalid="ignore"):
        if size(x) == 0 or bool(xp.isfinite(xp.sum(x))):
            return
    bad = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int64)))
    if bad:
        raise NumericalError(
            f"the {what} of {name} has {bad} NaN or infinite elements of {size(x)}",
            hint="check that the model was saved correctly; quantizing it would hide the damage",
        )


def split_groups(x: Array, group_size: int) -> Array:
    """Return a matrix (rows, columns) as (rows, groups, group size).

    Raises
    ------
    FormatError
        The group size does not divide the number of columns.
    """
    xp = array_namespace(x)
    rows, columns = x.shape
    if columns % group_size:
        raise FormatError(f"group size {group_size} does not divide {columns} input channels")
    return xp.reshape(x, (rows, columns // group_size, group_size))
