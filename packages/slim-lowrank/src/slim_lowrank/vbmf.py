"""Rank of the signal in a noisy matrix: empirical variational Bayes, solved analytically.

Nakajima, Sugiyama, Babacan, Tomioka: "Global analytic solution of fully-observed variational
Bayesian matrix factorization", JMLR 14 (2013).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.optimize

from slim_lowrank.factorize import Array, singular_values

_TINY = 1e-6  # keeps the logarithms and divisions of an all-zero matrix finite


def vbmf_rank(matrix: Any, *, name: str = "matrix") -> int:
    """Return the number of components that stand above the estimated noise, at least 1.

    The noise variance is unknown and found by minimising the free energy.  The matrix is laid on
    its long side first, so transposing it never changes the answer.

    Parameters
    ----------
    matrix : array_like, shape (m, n)
        Usually a trained weight; on random initialisations the answer is 1.
    name : str
        What errors call the matrix.
    """
    s = singular_values(matrix, name=name)
    shape = np.shape(matrix)
    rows, columns = min(shape), max(shape)
    if rows < 2 or s[0] == 0.0:
        return 1
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    xbar = (1 + tau) * (1 + alpha / tau)
    energy = s**2
    noise = _noise_variance(energy, rows, columns, alpha, xbar)
    return max(1, int(np.sum(energy > columns * noise * xbar)))


def _noise_variance(energy: Array, rows: int, columns: int, alpha: float, xbar: float) -> float:
    edge = min(math.ceil(rows / (1 + alpha)) - 1, rows) - 1
    edge = min(max(edge, 0), rows - 2)
    low = max(energy[edge + 1] / (columns * xbar), float(np.mean(energy[edge + 1 :])) / columns)
    high = float(np.sum(energy)) / (rows * columns)
    low, high = min(low, high), max(low, high)
    found = scipy.optimize.minimize_scalar(
        lambda variance: _free_energy(variance, energy, columns, alpha, xbar),
        bounds=(low, high),
        method="bounded",
    )
    return float(found.x)


def _free_energy(variance: float, energy: Array, columns: int, alpha: float, xbar: float) -> float:
    """Return twice the free energy over the number of columns, up to a constant."""
    x = energy / max(columns * variance, np.finfo(np.float64).tiny)
    noise, signal = x[x <= xbar], x[x > xbar]
    excess = signal - (1 + alpha)
    t = (excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0.0))) / 2
    value = np.sum(noise - np.log(np.maximum(noise, _TINY)))
    value += np.sum(signal - t) + np.sum(np.log((t + 1) / signal))
    return float(value + alpha * np.sum(np.log(t / alpha + 1)))
