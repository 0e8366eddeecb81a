"""GPTQ: round column by column and let the later columns make up for it (arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from slim_core.errors import NumericalError
from slim_core.numerics import check_finite
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore.algorithm_args import GptqArgs
from slim_mindspore.methods.rounding import find_params, int_type

Array = np.ndarray
_DAMP_TRIES = 3  # each adds ten times as much to the diagonal


@dataclass(frozen=True, eq=False)
class GptqResult:
    """Codes, scales and offsets as of rounding, and the damping that was used."""

    codes: Array
    scale: Array
    offset: Array
    damp_percent: float


def gptq(
    name: str,
    weight: Array,
    hessian: Array,
    scheme: TensorScheme,
    options: GptqArgs,
    weight_range: str,
) -> GptqResult:
    """Quantize a weight so that the error of its output is small.

    Parameters
    ----------
    name : str
        What errors call the layer.
    weight : numpy.ndarray, float32, shape (out, in)
    hessian : numpy.ndarray, float64, shape (in, in)
        Mean of ``x x^T`` over the inputs, up to a factor.
    scheme : TensorScheme
        Symmetric or not, per channel or per group.
    options : GptqArgs
    weight_range : str
        ``golden_stick`` or ``symmetric``.

    Raises
    ------
    NumericalError
        NaN or infinity in the inputs, or the Hessian stays singular with more damping.
    FormatError
        The group size does not divide the number of input channels.
    """
    check_finite(name, "weight", weight)
    check_finite(name, "Hessian of the inputs", hessian)
    columns = weight.shape[1]
    dead = np.diag(hessian) == 0
    work = np.where(dead, 0.0, weight).astype(np.float64)
    hessian = hessian + np.diag(dead.astype(np.float64))
    order = np.argsort(-np.diag(hessian), kind="stable") if options.desc_act else np.arange(columns)
    upper, damp = _inverse_factor(name, hessian[np.ix_(order, order)], options.damp_percent)
    group = scheme.group_size or columns
    scale, offset = find_params(work.astype(np.float32), scheme, weight_range)
    scale, offset = scale.copy(), offset.copy()
    # With columns out of order a group has no moment of its own at which to look at it.
    static = options.static_groups or options.desc_act or not scheme.group_size
    codes = np.zeros(weight.shape, np.int8)
    work = work[:, order]
    block = options.block_size or columns
    lowest, highest = _lowest(scheme, weight_range), int_type(scheme).max
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = np.zeros((len(work), end - start))
        for at in range(start, end):
            index = order[at] // group
            if not static and at % group == 0:
                members = work[:, at : at + group].astype(np.float32)
                if at + group > end:  # the columns beyond the block lag behind by its errors
                    members = _caught_up(work, errors, upper, start, end, at, group)
                new = find_params(members, _per_channel(scheme), weight_range)
                scale[:, index], offset[:, index] = new[0][:, 0], new[1][:, 0]
            s, z = scale[:, index].astype(np.float64), offset[:, index].astype(np.float64)
            # Rounded in float32, so that ties fall as they do without GPTQ.
            exact = work[:, at].astype(np.float32) / scale[:, index] + offset[:, index]
            code = np.clip(np.rint(exact), lowest, highest).astype(np.float64)
            codes[:, order[at]] = code
            error = (work[:, at] - (code - z) * s) / upper[at, at]
            work[:, at:end] -= error[:, None] * upper[at, at:end]
            errors[:, at - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return GptqResult(codes, scale, offset, damp)


def _inverse_factor(name: str, hessian: Array, damp_percent: float) -> tuple[Array, float]:
    """Return the upper Cholesky factor of the inverse of the damped Hessian."""
    mean = float(np.mean(np.diag(hessian)))
    damp = damp_percent
    for _ in range(_DAMP_TRIES):
        damped = hessian + np.eye(len(hessian)) * damp * mean
        try:
            lower = scipy.linalg.cho_factor(damped, lower=True)
            inverse = scipy.linalg.cho_solve(lower, np.eye(len(hessian)))
            return np.asarray(scipy.linalg.cholesky(inverse, lower=False)), damp
        except scipy.linalg.LinAlgError:
            damp = max(damp * 10, 1e-3)
    raise NumericalError(
        f"the Hessian of {name} cannot be inverted, even with damp_percent {damp / 10:g}",
        hint="use more calibration data or a larger damp_percent",
    )


def _caught_up(
    work: Array, errors: Array, upper: Array, start: int, end: int, at: int, group: int
) -> Array:
    members = work[:, at : at + group].copy()
    done = at - start
    beyond = slice(end, at + group)
    members[:, end - at :] -= errors[:, :done] @ upper[start:at, beyond]
    return np.asarray(members.astype(np.float32))


def _lowest(scheme: TensorScheme, weight_range: str) -> int:
    if scheme.symmetric and weight_range == "symmetric":
        return -int_type(scheme).max
    return int_type(scheme).min


def _per_channel(scheme: TensorScheme) -> TensorScheme:
    return TensorScheme(scheme.dtype, Granularity.PER_CHANNEL, scheme.symmetric)
