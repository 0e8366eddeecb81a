"""How far to trust the calibration of a layer: shrinkage chosen on a part held out.

Text to come differs from the calibration in the directions that the calibration shows little of.
Shrinkage keeps more of those, at a price on data like the calibration.  Where the price is small,
as the second half of the calibration judges what was fitted on the first, it is paid.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from slim_lowrank.factorize import Array
from slim_lowrank.whitening import SHRINKAGE

SHARES = (SHRINKAGE, 1e-2, 1e-1, 0.3)
PRICE = 0.05
"""Rise of the squared error on the held-out half, over the best share, that is paid."""
MAX_ROWS = 1024
"""Outputs looked at: the eigenvalue problems are of this size at most."""


def trusted_shrinkage(weight: Array, second: Array, first_half: Array, share: float) -> float:
    """Return the largest of :data:`SHARES` whose held-out error is near the least.

    Parameters
    ----------
    weight : array, shape (m, n)
        The layer.
    second : array, shape (n, n)
        Second moment of its inputs over the whole calibration.
    first_half : array, shape (n, n)
        The same over the first part of it.
    share : float
        Share of the positions that are in the first part, in (0, 1).

    Returns
    -------
    float
        Share of the mean input energy to add to every input.
    """
    weight = _few_rows(weight)
    held_out = (second - share * first_half) / (1 - share)
    fitted, judged = (weight @ moment @ weight.T for moment in (first_half, held_out))
    spread = (np.trace(first_half) / len(first_half)) * (weight @ weight.T)
    short = min(weight.shape)
    ranks = np.array(sorted({max(1, short // part) for part in (8, 4, 2)}))
    errors = np.array([_errors(fitted + s * spread, judged, ranks) for s in SHARES])
    floor = max(1e-12 * float(np.trace(judged)), np.finfo(float).tiny)
    rise = (errors / np.maximum(errors.min(0), floor)).mean(1)
    return max(s for s, each in zip(SHARES, rise, strict=True) if each <= rise.min() + PRICE)


def _few_rows(weight: Array) -> Array:
    """Return some outputs in the place of many: enough to compare shares by."""
    if len(weight) <= MAX_ROWS:
        return weight
    chosen = np.random.default_rng(0).choice(len(weight), MAX_ROWS, replace=False)
    return weight[np.sort(chosen)]


def _errors(fitted: Array, judged: Array, ranks: Array) -> Array:
    """Return squared errors, at each rank, of outputs whose second moment is ``judged``.

    They are projected onto the leading directions of outputs of second moment ``fitted``.
    """
    vectors = scipy.linalg.eigh(fitted, check_finite=False)[1][:, ::-1]
    kept = np.cumsum(np.sum((judged @ vectors) * vectors, axis=0))
    return np.asarray(np.maximum(np.trace(judged) - kept[ranks - 1], 0.0))
