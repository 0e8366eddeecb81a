"""Rounding a weight to the nearest code, with either convention for the range.

``golden_stick`` scales the largest magnitude to the middle of the outermost codes, ``scale = 2 *
max|w| / (2^b - 1)``, and uses all of them; ``symmetric`` is the convention of slim-ptq and
msModelSlim, ``scale = max|w| / (2^(b-1) - 1)`` without the most negative code.  Asymmetric weights
have one convention only.
"""

from __future__ import annotations

import numpy as np

from slim_core.dtypes import IntType
from slim_core.errors import FormatError
from slim_core.numerics import (
    EPS,
    check_finite,
    dequantize_weight,
    quantize,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import Granularity, TensorScheme

Array = np.ndarray


def int_type(scheme: TensorScheme) -> IntType:
    """Return the integer type of a scheme.

    Raises
    ------
    FormatError
        Its codes are places in a table.
    """
    if not isinstance(scheme.dtype, IntType):
        raise FormatError(f"codes must be integers, not {scheme.dtype}")
    return scheme.dtype


def find_params(weight: Array, scheme: TensorScheme, weight_range: str) -> tuple[Array, Array]:
    """Return scale and offset of a weight.

    Parameters
    ----------
    weight : numpy.ndarray, float32, shape (out, in)
    scheme : TensorScheme
        Per channel or per group.
    weight_range : str
        ``golden_stick`` or ``symmetric``.

    Returns
    -------
    scale, offset : numpy.ndarray, float32, shape (out, 1) or (out, groups)

    Raises
    ------
    FormatError
        The group size does not divide the number of input channels.
    """
    scale, offset = (np.asarray(item) for item in weight_params(weight, scheme))
    if scheme.symmetric and weight_range == "golden_stick":
        # The maximum again, since scaling the other scale would round twice.
        peak = np.abs(weight).reshape(scale.shape[0], scale.shape[1], -1).max(axis=2)
        codes = np.float32(int_type(scheme).max - int_type(scheme).min)
        scale = np.maximum(np.float32(2) * peak / codes, np.float32(EPS))
    return scale, offset


def round_weight(
    weight: Array, scale: Array, offset: Array, scheme: TensorScheme, weight_range: str
) -> Array:
    """Return int8 codes, shape (out, in), for parameters as :func:`find_params` gives them."""
    if not scheme.symmetric or weight_range == "symmetric":
        return np.asarray(quantize_weight(weight, scale, offset, scheme))
    if scheme.granularity is not Granularity.PER_GROUP:
        return np.asarray(quantize(weight, scale, None, int_type(scheme)))
    grouped = weight.reshape(*scale.shape, -1)
    codes = np.asarray(quantize(grouped, scale[..., None], None, int_type(scheme)))
    return codes.reshape(weight.shape)


def round_to_nearest(
    name: str, weight: Array, scheme: TensorScheme, weight_range: str
) -> tuple[Array, Array, Array]:
    """Return codes, scale and offset of a weight.

    Raises
    ------
    NumericalError
        The weight holds NaN or infinity.
    FormatError
        The group size does not divide the number of input channels.
    """
    check_finite(name, "weight", weight)
    scale, offset = find_params(weight, scheme, weight_range)
    return round_weight(weight, scale, offset, scheme, weight_range), scale, offset


def restored(weight: Array, scheme: TensorScheme, weight_range: str) -> Array:
    """Return a weight rounded to codes and back."""
    scale, offset = find_params(weight, scheme, weight_range)
    codes = round_weight(weight, scale, offset, scheme, weight_range)
    return np.asarray(dequantize_weight(codes, scale, offset))
