"""Factors of one layer: from its weight, and from the statistics of its data if there are any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slim_lowrank import conv_forms
from slim_lowrank.build import Factors, source_bias
from slim_lowrank.factorize import Array, balanced_factors, truncated_svd
from slim_lowrank.layers import Layer, to_array, weight_array
from slim_lowrank.pivot import pivot_rows
from slim_lowrank.table import LayerRanks
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
    target : array, optional
        ``(out, f)``: cross moment of the wanted outputs and the inputs seen, for the sequential
        update, where the inputs come from the decomposed model and the outputs from the dense one.
    target_mean : array, optional
        ``(out,)``, mean of the wanted outputs, without bias.
    positions : tuple of int
        Positions per batch at the input, halfway (vertical stride done) and at the output.
    """

    rows: int
    input_mean: Array | None = None
    input_second: Array | None = None
    output_mean: Array | None = None
    output_second: Array | None = None
    gamma: Array | None = None
    target: Array | None = None
    target_mean: Array | None = None
    positions: tuple[int, int, int] = (1, 1, 1)

    def damped_gamma(self) -> Array | None:
        """Return ``gamma`` made positive definite, or None."""
        return None if self.gamma is None else shrink(self.gamma, GAMMA_DAMPING)


def solve_plain(layer: Layer, ranks: LayerRanks) -> Factors:
    """Return the factors with the least error of the weight itself; the bias is kept."""
    weight, bias = weight_array(layer), bias_array(layer)
    if not layer.is_matrix:
        kernels = conv_forms.fit(ranks.form, weight, ranks.ranks, name=f"layer {layer.name!r}")
        return Factors(kernels, bias)
    weight = flat_weight(layer)
    svd = truncated_svd(weight, ranks.ranks[0], name=f"weight of layer {layer.name!r}")
    first, last = balanced_factors(svd)
    return pair_factors(layer, ranks, first, last, bias)


def solve_with_data(layer: Layer, ranks: LayerRanks, statistics: Statistics) -> Factors:
    """Return the factors with the least error of the outputs (or of the loss) and the fixed bias.

    The bias fix ``b + (W - A) E[x]`` makes the mean error of the outputs zero; it needs a bias in
    ``ranks``, and then the statistics are centred.
    """
    problem = matrix_problem(layer, statistics, centred=ranks.bias)
    bias = bias_array(layer)
    if layer.is_matrix or ranks.form == "out":
        rank = ranks.ranks[0]
        first, last = problem.factors(rank)
        if ranks.bias:
            mean = wanted_mean(layer, statistics)
            seen = mean if statistics.input_mean is None else problem.weight @ statistics.input_mean
            bias = (0.0 if bias is None else bias) + mean - problem.project(rank, seen)
        if layer.is_matrix:
            return pair_factors(layer, ranks, first, last, bias)
        return Factors(
            (first.reshape(-1, *layer.shape[1:]), last.reshape(*last.shape, *_ones(layer))), bias
        )
    kernel = problem.weight.reshape(layer.shape)
    kernels = conv_forms.fit(
        ranks.form,
        kernel,
        ranks.ranks,
        second=problem.second,
        gamma=problem.gamma,
        name=f"layer {layer.name!r}",
    )
    if ranks.bias and statistics.input_mean is not None:
        kept = conv_forms.compose(ranks.form, kernels).reshape(layer.shape[0], -1)
        mean = wanted_mean(layer, statistics) - kept @ statistics.input_mean
        bias = (0.0 if bias is None else bias) + mean
    return Factors(kernels, bias)


def matrix_problem(layer: Layer, statistics: Statistics, *, centred: bool) -> MatrixProblem:
    """Return the layer, flattened to ``(out, features)``, in the metric of its statistics."""
    weight = flat_weight(layer)
    name, gamma = f"layer {layer.name!r}", statistics.damped_gamma()
    if statistics.input_second is None:
        output = _centre(statistics.output_second, statistics.output_mean, centred)
        if layer.kind == "embedding":
            output = _smoothed(weight, _required(output), statistics.rows)
        return MatrixProblem(weight, output=output, gamma=gamma, name=name)
    second = shrink(_required(statistics.input_second), SHRINKAGE)
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

    Ridge regression towards ``W`` with the shrinkage that ``second`` has: directions that the
    calibration hardly shows keep the weight's own action.
    """
    target = _required(statistics.target)
    mean = _required(statistics.input_mean)
    if centred:
        target = target - np.outer(_required(statistics.target_mean), mean)
    exact = _required(_centre(statistics.input_second, mean, centred))
    correction = target - weight @ exact
    return np.asarray(weight + np.linalg.solve(second, correction.T).T)


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


def _ones(layer: Layer) -> list[int]:
    return [1] * (len(layer.shape) - 2)
