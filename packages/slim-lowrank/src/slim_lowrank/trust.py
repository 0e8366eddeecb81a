"""How far to trust the calibration of a layer: shrinkage chosen on a part held out.

Text to come differs from the calibration in the directions that the calibration shows little of.
Shrinkage keeps more of those, at a price on data like the calibration.  Where the price is small,
as the second half of the calibration judges what was fitted on the first, it is paid.
"""

from __future__ import annotations

import numpy as np

from slim_lowrank.factorize import Array
from slim_lowrank.whitening import SHRINKAGE, MatrixProblem, shrink

SHARES = (SHRINKAGE, 1e-2, 1e-1, 0.3)
PRICE = 0.05
"""Rise of the squared error on the held-out half, over the best share, that is paid."""


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
    held_out = (second - share * first_half) / (1 - share)
    short = min(weight.shape)
    ranks = sorted({max(1, short // part) for part in (8, 4, 2)})
    errors = np.array([_errors(weight, shrink(first_half, s), held_out, ranks) for s in SHARES])
    floor = 1e-12 * float(np.sum((weight @ held_out) * weight))
    rise = (errors / np.maximum(errors.min(0), floor)).mean(1)
    return max(s for s, each in zip(SHARES, rise, strict=True) if each <= rise.min() + PRICE)


def _errors(weight: Array, fitted: Array, judged: Array, ranks: list[int]) -> list[float]:
    """Squared output errors under the moment ``judged`` of approximations fitted to another."""
    problem = MatrixProblem(weight, second=fitted)
    found = []
    for rank in ranks:
        lost = weight - problem.projection(rank) @ weight
        found.append(max(float(np.sum((lost @ judged) * lost)), 0.0))
    return found
