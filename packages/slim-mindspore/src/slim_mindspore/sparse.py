"""Sparse quantization of weights: a 4-bit body and int8 outliers.

The largest elements of a matrix are set aside, each row is scaled so that the rest fits 4 bits, and
everything is stored in int8: the body falls within [-7, 7], so most codes are small and many are
zero, which is what the weight compressor of Ascend lives on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slim_core.dtypes import INT4, INT8
from slim_core.errors import FormatError
from slim_core.layers import QuantizedLinear
from slim_core.numerics import EPS, check_finite, dequantize, quantize
from slim_core.scheme import Granularity, QuantScheme, TensorScheme

# int8 storage and static int8 activations: to an engine this is a W8A8 layer.
SPARSE_SCHEME = QuantScheme(
    TensorScheme(INT8, Granularity.PER_CHANNEL),
    TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False),
)


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A sparse-quantized matrix.

    Parameters
    ----------
    codes : numpy.ndarray, int8, shape (out, in)
        In ``[-127, 127]``; elements that are not outliers in ``[-7, 7]``.
    scale : numpy.ndarray, float32, shape (out, 1)
    outliers : int
        Number of elements above the threshold.
    """

    codes: np.ndarray
    scale: np.ndarray
    outliers: int

    def dequantized(self) -> np.ndarray:
        """Return the float32 weight that the codes stand for."""
        return np.asarray(dequantize(self.codes, self.scale, None))


def quantize_sparse(name: str, weight: np.ndarray, fraction: float) -> SparseWeight:
    """Quantize a matrix to a 4-bit body and int8 outliers.

    With ``k = int(size * fraction)`` the threshold is the k-th largest magnitude of the whole
    matrix; what lies above it is an outlier.  The scale of a row is its largest magnitude among
    the rest over 7.  A row of outliers and zeros alone is scaled by its largest outlier over 127.

    Parameters
    ----------
    name : str
        What errors call the weight.
    weight : numpy.ndarray, floating, shape (out, in)
    fraction : float
        In ``[0, 1)``.

    Raises
    ------
    FormatError
        The weight is not a matrix.
    NumericalError
        It holds NaN or infinity.
    """
    if weight.ndim != 2 or weight.size == 0:
        raise FormatError(f"{name} must be a matrix, not of shape {weight.shape}")
    matrix = weight.astype(np.float32, copy=False)
    check_finite(name, "weight", matrix)
    magnitude = np.abs(matrix)
    outlier = magnitude > _threshold(magnitude, int(weight.size * fraction))
    peak = np.where(outlier, np.float32(0), magnitude).max(axis=1, keepdims=True)
    whole = magnitude.max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / np.float32(INT4.max), whole / np.float32(INT8.max))
    scale = np.maximum(scale, np.float32(EPS))
    codes = np.asarray(quantize(matrix, scale, None, INT8, low=-INT8.max))
    return SparseWeight(codes, scale, int(outlier.sum()))


def stored_layer(
    name: str,
    weight: SparseWeight,
    input_scale: float,
    input_offset: float,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """Return a layer with its activation parameters rounded as the checkpoint stores them.

    The input scale is stored in float16 and the offset in int8; the folded scale and bias are
    formed from the stored values, so that a reader of the file gets the same numbers.
    """
    scale = np.asarray([input_scale], np.float16).astype(np.float32)
    if not 0 < scale[0] < np.inf:
        raise FormatError(f"{name}: float16 cannot hold the input scale {input_scale:.3g}")
    return QuantizedLinear(
        name=name,
        scheme=SPARSE_SCHEME,
        codes=weight.codes,
        weight_scale=weight.scale,
        weight_offset=np.zeros_like(weight.scale),
        input_scale=scale,
        input_offset=np.asarray([input_offset], np.int8).astype(np.float32),
        bias=None if bias is None else bias.astype(np.float32),
    )


def _threshold(magnitude: np.ndarray, count: int) -> float:
    """Return the ``count``-th largest element; infinity if there are none to set aside."""
    if count < 1:
        return float("inf")
    flat = magnitude.reshape(-1)
    return float(np.partition(flat, flat.size - count)[flat.size - count])
