"""Factors of one layer: from its weight, and from the statistics of its data if there are any."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from torch import Tensor

from slim_lowrank import conv_forms
from slim_lowrank.build import Factors, source_bias
from slim_lowrank.factorize import Array, balanced_factors, truncated_svd
from slim_lowrank.layers import Layer, to_array, weight_array
from slim_lowrank.pivot import pivot_rows
from slim_lowrank.table import LayerRanks
from slim_lowrank.trust import trusted_shrinkage
from slim_lowrank.whitening import GAMMA_DAMPING, SHRINKAGE, MatrixProblem, shrink


@dataclass
class Statistics:
    """What calibration has seen of one layer; all moments are means over rows (positions).

    Parameters
    ----------
    rows : int
        Number of positions seen.
    input_mean, input_second : array, optional
        ``(f,)`` and ``(f, f)`` of the inputs: features, or patches of a convolution.
    output_mean, output_second : array, optional
        ``(out,)`` and ``(out, out)`` of the outputs without bias, where inputs are not kept.
    gamma : array, optional
        ``(out, out)``, second moment of the gradients of the loss, times the positions per batch.
    gradient : float
        Mean diagonal entry of the same, known for every layer that gradients reached.
    target : array, optional
        ``(out, f)``: cross moment of the wanted outputs and the inputs seen, for the sequential
        update, where the inputs come from the decomposed model and the outputs from the dense one.
    target_mean : array, optional
        ``(out,)``, mean of the wanted outputs, without bias.
    target_energy : float
        ``E|y|^2`` of the wanted outputs, without bias.
    ridge : float
        How firmly the sequential update holds on to the weight, in units of the mean input
        energy; infinity switches it off.
    shrinkage : float
        Share of the mean input energy that every input gets; large values trust the calibration
        less, and infinity would be the plain weight.
    first_half : Tensor, optional
        fp32 ``(f, f)``: sum of ``x x^T`` over the first ``first_rows`` positions, where kept.
    first_rows : int
    positions : tuple of int
        Positions per batch at the input, halfway (vertical stride done) and at the output.
    """

    rows: int
    input_mean: Array | None = None
    input_second: Array | None = None
    output_mean: Array | None = None
    output_second: Array | None = None
    gamma: Array | None = None
    gradient: float = 0.0
    target: Array | None = None
    target_mean: Array | None = None
    target_energy: float = 0.0
    ridge: float = SHRINKAGE
    shrinkage: float = SHRINKAGE
    first_half: Tensor | None = None
    first_rows: int = 0
    positions: tuple[int, int, int] = (1, 1, 1)

    def find_shrinkage(self, weight: Array) -> None:
        """Set the shrinkage by the first half, if it was kept, and forget the half.

        See :func:`slim_lowrank.trust.trusted_shrinkage`; ``weight`` has the shape ``(out, f)``.
        """
        if self.first_half is not None and self.input_second is not None:
            first = (self.first_half.double() / self.first_rows).numpy()
            share = self.first_rows / self.rows
            self.shrinkage = trusted_shrinkage(weight, self.input_second, first, share)
            self.first_half = None

    def damped_gamma(self) -> Array | None:
        """Return ``gamma`` made positive definite, or None."""
        return None if self.gamma is None else shrink(self.gamma, GAMMA_DAMPING)


def solve_plain(layer: Layer, ranks: LayerRanks) -> Factors:
    """Return the factors with the least error of the weight itself; the bias is kept."""
    bias = bias_array(layer)
    if not layer.is_matrix:
        weight = weight_array(layer)
        kernels = conv_forms.fit(ranks.form, weight, ranks.ranks, name=f"layer {layer.name!r}")
        lost = weight - conv_forms.compose(ranks.form, kernels)
        return Factors(kernels, bias, error=_root_ratio(np.sum(lost**2), np.sum(weight**2)))
    weight = flat_weight(layer)
    svd = truncated_svd(weight, ranks.ranks[0], name=f"weight of layer {layer.name!r}")
    total = float(np.sum(weight**2))
    error = _root_ratio(total - float(np.sum(svd.s**2)), total)
    return replace(pair_factors(layer, ranks, *balanced_factors(svd), bias), error=error)


def solve_with_data(layer: Layer, ranks: LayerRanks, statistics: Statistics) -> Factors:
    """Return the factors with the least error of the outputs (or of the loss) and the fixed bias.

    The bias fix ``b + (W - A) E[x]`` makes the mean error of the outputs zero; it needs a bias in
    ``ranks``, and then the statistics are centred.
    """
    problem = matrix_problem(layer, statistics, centred=ranks.bias)
    bias = bias_array(layer)
    kernels: tuple[Array, ...] = ()
    if layer.is_matrix or ranks.form == "out":
        first, last = problem.factors(ranks.ranks[0])
        kept = last @ first
        kernels = (first.reshape(-1, *layer.shape[1:]), last.reshape(*last.shape, *_ones(layer)))
    else:
        kernels = conv_forms.fit(
            ranks.form,
            problem.weight.reshape(layer.shape),
            ranks.ranks,
            second=problem.second,
            gamma=problem.gamma,
            name=f"layer {layer.name!r}",
        )
        kept = conv_forms.compose(ranks.form, kernels).reshape(layer.shape[0], -1)
    if ranks.bias:
        bias = (0.0 if bias is None else bias) + _mean_error(
            layer, ranks, statistics, problem, kept
        )
    error = predicted_error(layer, ranks, statistics, problem, kept)
    if layer.is_matrix:
        return replace(pair_factors(layer, ranks, first, last, bias), error=error)
    return Factors(kernels, bias, error=error)


def predicted_error(
    layer: Layer, ranks: LayerRanks, statistics: Statistics, problem: MatrixProblem, kept: Array
) -> float:
    """Return the relative error of the outputs on the calibration data itself.

    Parameters
    ----------
    layer, ranks, statistics, problem
        As in :func:`solve_with_data`.
    kept : array, shape (out, features)
        The low-rank map.
    """
    if statistics.input_second is None:
        output = problem.output_second
        lost = np.eye(len(output)) - problem.projection(ranks.ranks[0])
        total = float(np.trace(_required(statistics.output_second)))
        return _root_ratio(np.sum((lost @ output) * lost), total)
    mean, second = _required(statistics.input_mean), statistics.input_second
    weight = flat_weight(layer)
    if statistics.target is None:
        total = float(np.sum((weight @ second) * weight))
        used = _required(_centre(second, mean, ranks.bias))
        return _root_ratio(np.sum(((weight - kept) @ used) * (weight - kept)), total)
    total = statistics.target_energy
    target, offset = statistics.target, 0.0
    if ranks.bias:
        wanted = _required(statistics.target_mean)
        target, offset = target - np.outer(wanted, mean), float(wanted @ wanted)
        second = second - np.outer(mean, mean)
    squared = total - offset - 2 * np.sum(kept * target) + np.sum((kept @ second) * kept)
    return _root_ratio(squared, total)


def _mean_error(
    layer: Layer, ranks: LayerRanks, statistics: Statistics, problem: MatrixProblem, kept: Array
) -> Array:
    """Return the mean of what the outputs without bias lose."""
    wanted = wanted_mean(layer, statistics)
    if statistics.input_mean is not None:
        return np.asarray(wanted - kept @ statistics.input_mean)
    return np.asarray(wanted - problem.projection(ranks.ranks[0]) @ wanted)


def matrix_problem(layer: Layer, statistics: Statistics, *, centred: bool) -> MatrixProblem:
    """Return the layer, flattened to ``(out, features)``, in the metric of its statistics."""
    weight = flat_weight(layer)
    name, gamma = f"layer {layer.name!r}", statistics.damped_gamma()
    if statistics.input_second is None:
        output = _centre(statistics.output_second, statistics.output_mean, centred)
        if layer.kind == "embedding":
            output = _smoothed(weight, _required(output), statistics.rows)
        return MatrixProblem(weight, output=output, gamma=gamma, name=name)
    second = shrink(_required(statistics.input_second), statistics.shrinkage)
    second = _required(_centre(second, statistics.input_mean, centred))
    if statistics.target is not None:
        weight = _compensated(weight, statistics, second, centred)
    return MatrixProblem(weight, second=second, gamma=gamma, name=name)


def flat_weight(layer: Layer) -> Array:
    """Return the weight as ``(out, features)``; an embedding as ``(width, entries)``."""
    weight = weight_array(layer)
    return weight.T if layer.kind == "embedding" else weight.reshape(weight.shape[0], -1)


def wanted_mean(layer: Layer, statistics: Statistics) -> Array:
    """Return the mean output without bias that the decomposed layer should have."""
    if statistics.target_mean is not None:
        return statistics.target_mean
    if statistics.input_mean is None:
        return _required(statistics.output_mean)
    return np.asarray(flat_weight(layer) @ statistics.input_mean)


def pair_factors(
    layer: Layer, ranks: LayerRanks, first: Array, last: Array, bias: Array | None
) -> Factors:
    """Store ``last @ first`` the way the layer's kind and form ask for."""
    if ranks.form == "pivot":
        pivot, rest, order = pivot_rows(first, last)
        return Factors((pivot, rest), bias, order)
    if layer.kind == "embedding":
        return Factors((first.T, last))
    return Factors((first, last), bias)


def bias_array(layer: Layer) -> Array | None:
    """Return the bias as float64, or None."""
    bias = source_bias(layer)
    return None if bias is None else to_array(bias)


def _compensated(weight: Array, statistics: Statistics, second: Array, centred: bool) -> Array:
    """Return the map of the inputs seen onto the outputs wanted, pulled towards the weight.

    Ridge regression towards ``W``: directions that the calibration hardly shows keep the weight's
    own action.
    """
    if math.isinf(statistics.ridge):
        return weight
    target = _required(statistics.target)
    mean = _required(statistics.input_mean)
    if centred:
        target = target - np.outer(_required(statistics.target_mean), mean)
    exact = _required(_centre(statistics.input_second, mean, centred))
    correction = target - weight @ exact
    held = shrink(second, statistics.ridge)
    return np.asarray(weight + scipy.linalg.solve(held, correction.T, assume_a="pos").T)


def _smoothed(weight: Array, output: Array, rows: int) -> Array:
    """Add one count to every entry of a table: entries not seen must not be lost."""
    entries = weight.shape[1]
    return np.asarray((rows * output + weight @ weight.T) / (rows + entries))


def _centre(second: Array | None, mean: Array | None, centred: bool) -> Array | None:
    if second is None or mean is None or not centred:
        return second
    return np.asarray(second - np.outer(mean, mean))


def _required(value: Array | None) -> Array:
    if value is None:
        raise TypeError("these statistics were not collected")
    return value


def _root_ratio(part: float, total: float) -> float:
    return math.sqrt(max(float(part), 0.0) / total) if total > 0 else 0.0


def _ones(layer: Layer) -> list[int]:
    return [1] * (len(layer.shape) - 2)
