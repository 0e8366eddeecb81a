"""Activations in the OCP microscaling formats: groups that share a power of two."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from slim_core.errors import FormatError
from slim_core.numerics import affine_params, dequantize, quantize
from slim_core.scheme import TensorScheme

Array = Any


def round_groups(x: Array, scheme: TensorScheme) -> Array:
    """Return what is left of ``x`` when each group of its last axis is quantized at run time.

    Parameters
    ----------
    x : array, float32, shape (..., channels)
    scheme : TensorScheme
        Of PER_GROUP granularity, symmetric.

    Raises
    ------
    FormatError
        The group size does not divide the number of channels.
    """
    xp = array_namespace(x)
    if x.shape[-1] % scheme.group_size:
        raise FormatError(
            f"group size {scheme.group_size} does not divide {x.shape[-1]} input channels"
        )
    groups = xp.reshape(x, (*x.shape[:-1], -1, scheme.group_size))
    peak = xp.max(xp.abs(groups), axis=-1, keepdims=True)
    scale, _ = affine_params(-peak, peak, scheme)
    codes = quantize(groups, scale, None, scheme.dtype)
    return xp.reshape(dequantize(codes, scale, None, scheme.dtype), x.shape)
