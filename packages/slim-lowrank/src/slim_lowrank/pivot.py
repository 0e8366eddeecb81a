"""Pivot storage of a rank-r matrix: r of its own rows, and how the others combine them.

Zhao et al., "Pivoting factorization" (PIFA), ICML 2025: exact, and ``r^2`` weights smaller than a
factor pair.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from slim_lowrank.factorize import Array


def pivot_rows(first: Array, last: Array) -> tuple[Array, Array, Array]:
    """Rewrite ``A = last @ first`` in terms of its own rows.

    Parameters
    ----------
    first : array, shape (r, n)
        Right factor, rows independent.
    last : array, shape (m, r)
        Left factor, ``m > r``.

    Returns
    -------
    pivot : array, shape (r, n)
        Rows of ``A``, picked by a QR decomposition with column pivoting so that they are far from
        dependent.
    rest : array, shape (m - r, r)
        ``rest @ pivot`` are the other rows.
    order : array of int, shape (m,)
        ``concatenate([pivot, rest @ pivot])[order]`` is ``A``.
    """
    m, rank = last.shape
    # Orthonormal rows on the right make the pivoting of the left factor that of A itself.
    right, triangle = scipy.linalg.qr(first.T, mode="economic", check_finite=False)
    left = last @ triangle.T
    _, _, permutation = scipy.linalg.qr(left.T, mode="economic", pivoting=True, check_finite=False)
    rows, others = permutation[:rank], permutation[rank:]
    rest = scipy.linalg.solve(left[rows].T, left[others].T, check_finite=False).T
    order = np.empty(m, dtype=np.int64)
    order[permutation] = np.arange(m)
    return left[rows] @ right.T, rest, order
