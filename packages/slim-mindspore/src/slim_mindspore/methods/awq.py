"""AWQ: scale up the input channels that matter before rounding (arXiv:2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slim_core.numerics import affine_params, check_finite, dequantize_weight
from slim_core.scheme import TensorScheme
from slim_mindspore.algorithm_args import AwqArgs
from slim_mindspore.methods.rounding import find_params, restored, round_weight

Array = np.ndarray
_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class AwqResult:
    """Codes of ``weight * smooth``, what the input is divided by, and what was chosen."""

    codes: Array
    scale: Array
    offset: Array
    smooth: Array
    alpha: float
    error: float


def awq(
    name: str,
    weight: Array,
    rows: Array,
    input_mean: Array,
    scheme: TensorScheme,
    options: AwqArgs,
    weight_range: str,
) -> AwqResult:
    """Search the exponent of the scales, then the range of each group.

    Parameters
    ----------
    name : str
        What errors call the layer.
    weight : numpy.ndarray, float32, shape (out, in)
    rows : numpy.ndarray, float32, shape (tokens, in)
        Inputs on which the error of the output is measured.
    input_mean : numpy.ndarray, float32, shape (in,)
        Mean magnitude of each input channel.
    scheme : TensorScheme
        Of the weight.
    options : AwqArgs
    weight_range : str
        Convention for symmetric weights.

    Returns
    -------
    AwqResult
        ``error`` is the relative error of the output on ``rows``.

    Raises
    ------
    NumericalError
        The weight holds NaN or infinity.
    """
    check_finite(name, "weight", weight)
    gram = rows.astype(np.float64).T @ rows
    weight_mean = _normalized_mean(weight, scheme.group_size)
    best = (np.inf, 0.0, np.ones(weight.shape[1], np.float32))
    for alpha in options.alphas:
        smooth = awq_scales(input_mean, weight_mean, alpha, options.duo_scaling)
        difference = restored(weight * smooth, scheme, weight_range) / smooth - weight
        error = _output_error(difference, gram)
        if error < best[0]:
            best = (error, alpha, smooth)
    _, alpha, smooth = best
    scaled = weight * smooth
    scale, offset = _clipped(scaled, gram / np.outer(smooth, smooth), scheme, options, weight_range)
    codes = round_weight(scaled, scale, offset, scheme, weight_range)
    final = np.asarray(dequantize_weight(codes, scale, offset)) / smooth - weight
    relative = np.sqrt(_output_error(final, gram) / max(_output_error(weight, gram), 1e-30))
    return AwqResult(codes, scale, offset, smooth, alpha, float(relative))


def awq_scales(input_mean: Array, weight_mean: Array, alpha: float, duo_scaling: bool) -> Array:
    """Return the scales for one exponent, around 1.

    ``mean|x|^alpha / (mean|w|^(1 - alpha) + 1e-4)``, or ``mean|x|^alpha`` alone, at least 1e-4,
    divided by the geometric mean of their extremes.
    """
    scales = input_mean.astype(np.float64) ** alpha
    if duo_scaling:
        scales = scales / (weight_mean.astype(np.float64) ** (1 - alpha) + _FLOOR)
    scales = np.maximum(scales, _FLOOR)
    return np.asarray((scales / np.sqrt(scales.max() * scales.min())).astype(np.float32))


def _normalized_mean(weight: Array, group_size: int) -> Array:
    """Return the mean over rows of magnitudes divided by the largest of their group."""
    grouped = np.abs(weight).reshape(len(weight), -1, group_size or weight.shape[1])
    peak = np.maximum(grouped.max(axis=2, keepdims=True), np.float32(1e-6))
    return np.asarray((grouped / peak).reshape(weight.shape).mean(axis=0))


def _output_error(difference: Array, gram: Array) -> float:
    """Return ``sum |x d^T|^2`` over the inputs that ``gram`` sums up."""
    wide = difference.astype(np.float64)
    return float(np.sum((wide @ gram) * wide))


def _clipped(
    weight: Array, gram: Array, scheme: TensorScheme, options: AwqArgs, weight_range: str
) -> tuple[Array, Array]:
    """Return the parameters of each group at the share of its range that errs least."""
    scale, offset = find_params(weight, scheme, weight_range)
    groups = scale.shape[1]
    grouped = weight.reshape(len(weight), groups, -1)
    size = grouped.shape[2]
    blocks = np.stack([gram[i : i + size, i : i + size] for i in range(0, groups * size, size)])
    least = np.full(scale.shape, np.inf)
    best_scale, best_offset = scale.copy(), offset.copy()
    for ratio in options.ratios:
        if scheme.symmetric:
            new_scale, new_offset = scale * np.float32(ratio), offset
        else:
            low, high = (side(grouped, axis=2) * np.float32(ratio) for side in (np.min, np.max))
            new_scale, new_offset = (np.asarray(p) for p in affine_params(low, high, scheme))
        codes = round_weight(weight, new_scale, new_offset, scheme, weight_range)
        wrong = (np.asarray(dequantize_weight(codes, new_scale, new_offset)) - weight).reshape(
            grouped.shape
        )
        error = np.einsum("ogi,gij,ogj->og", wrong, blocks, wrong, optimize=True)
        better = error < least
        least = np.where(better, error, least)
        best_scale = np.where(better, new_scale, best_scale)
        best_offset = np.where(better, new_offset, best_offset)
    return best_scale.astype(np.float32), best_offset.astype(np.float32)
