"""Truncated singular value decompositions of weight matrices.

``truncated_svd`` chooses among four ways; each is exact in the truncated sense except the
randomized one, which checks itself:

- ``eigh``: eigenvectors of the Gram matrix of the short side, in float64.  Squaring the singular
  values is harmless there for float32 weights: values down to about 1e-8 of the largest resolve.
- ``gesdd``: LAPACK's divide and conquer on the matrix itself; the robust way when ``eigh`` fails.
- ``arpack``: Lanczos iterations for ranks far below the short side, verified, seeded.
- ``randomized``: Halko, Martinsson, Tropp 2011, with power iterations until the captured energy
  stands still; for matrices whose Gram matrix does not fit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from numpy.typing import NDArray

from slim_core.errors import InvalidTypeError, InvalidValueError, NumericalError
from slim_core.logging import get_logger
from slim_core.validate import check_choice, check_int

logger = get_logger("lowrank")

Array = NDArray[Any]
Backend = Literal["auto", "eigh", "gesdd", "arpack", "randomized"]
BACKENDS: tuple[Backend, ...] = ("auto", "eigh", "gesdd", "arpack", "randomized")
GRAM_LIMIT = 16384
"""Longest short side whose float64 Gram matrix (2 GiB) and eigenvectors are formed."""


class SVD(NamedTuple):
    """``u (m, r)``, ``s (r,)`` descending, ``vt (r, n)``, all float64."""

    u: Array
    s: Array
    vt: Array


def check_matrix(name: str, value: Any) -> Array:
    """Return a finite 2-D array as float64.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Not an array of numbers, not 2-D, or empty.
    NumericalError
        NaN or infinity inside.
    """
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise InvalidTypeError(f"{name} must hold real numbers, not {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidValueError(f"{name} must be a non-empty matrix, not of shape {array.shape}")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise NumericalError(f"{name} holds NaN or infinity")
    return array


def truncated_svd(
    matrix: Any, rank: int, *, backend: Backend = "auto", seed: int = 0, name: str = "matrix"
) -> SVD:
    """Return the leading ``rank`` singular triples of a real matrix.

    Parameters
    ----------
    matrix : array_like, shape (m, n)
        Any real dtype; computed in float64.
    rank : int
        In ``[1, min(m, n)]``.
    backend : str
        See the module; ``auto`` picks by size and rank.
    seed : int
        Start vectors of ``arpack`` and ``randomized``.
    name : str
        What errors call the matrix.
    """
    a = check_matrix(name, matrix)
    short = min(a.shape)
    check_int(f"rank of {name}", rank, low=1, high=short)
    check_choice("backend", backend, BACKENDS)
    way = choose_backend(a.shape, rank) if backend == "auto" else backend
    if way == "gesdd":
        u, s, vt = scipy.linalg.svd(a, full_matrices=False, lapack_driver="gesdd")
        return SVD(u[:, :rank], s[:rank], vt[:rank])
    if way == "arpack" and rank < short:
        return _arpack(a, rank, seed)
    if way == "randomized":
        return _randomized(a, rank, seed)
    return _eigh(a, rank)


def choose_backend(shape: tuple[int, ...], rank: int) -> Backend:
    """Return the fastest safe way for a matrix of this shape (see benchmarks/slim-lowrank)."""
    short, long = min(shape), max(shape)
    if short > GRAM_LIMIT:
        return "randomized"
    if short >= 2048 and rank <= short // 16 and long < 2 * short:
        return "arpack"
    return "eigh"


def top_eigh(gram: Array, rank: int) -> tuple[Array, Array]:
    """Return the ``rank`` largest eigenvalues, descending, and their eigenvectors as columns."""
    n = gram.shape[0]
    if rank <= n // 4:
        values, vectors = scipy.linalg.eigh(
            gram, subset_by_index=(n - rank, n - 1), driver="evr", check_finite=False
        )
    else:
        values, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
    return values[::-1][:rank], vectors[:, ::-1][:, :rank]


def singular_values(matrix: Any, *, name: str = "matrix") -> Array:
    """Return all singular values, descending, from the Gram matrix of the short side."""
    a = check_matrix(name, matrix)
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    values = scipy.linalg.eigvalsh(gram, check_finite=False)[::-1]
    return np.asarray(np.sqrt(np.maximum(values, 0.0)))


def balanced_factors(svd: SVD) -> tuple[Array, Array]:
    """Return ``(sqrt(S) V, U sqrt(S))``: shapes ``(r, n)`` and ``(m, r)``, of equal norms."""
    root = np.sqrt(svd.s)
    return root[:, None] * svd.vt, svd.u * root


def balance(first: Array, last: Array) -> tuple[Array, Array]:
    """Scale each component so that both its halves have one norm; the product stays.

    Half-precision storage and training both suffer when one factor holds the whole scale.
    """
    down = np.linalg.norm(first, axis=1)
    up = np.linalg.norm(last, axis=0)
    used = (down > 0) & (up > 0)
    scale = np.sqrt(np.divide(up, down, out=np.ones_like(up), where=used))
    return first * scale[:, None], last / scale


def _eigh(a: Array, rank: int) -> SVD:
    tall = a.shape[0] > a.shape[1]
    side = a.T if tall else a
    try:
        _, u = top_eigh(side @ side.T, rank)
    except scipy.linalg.LinAlgError:
        logger.warning("eigh did not converge on a %s matrix; gesdd is used", a.shape)
        return truncated_svd(a, rank, backend="gesdd")
    return _from_left(side, u, tall)


def _from_left(side: Array, u: Array, tall: bool) -> SVD:
    """Complete a decomposition from left vectors, by projection: no small value is divided by."""
    projected = u.T @ side
    s = np.linalg.norm(projected, axis=1)
    floor = np.finfo(np.float64).eps * (s.max() if s.size else 0.0)
    vt = np.divide(projected, s[:, None], out=np.zeros_like(projected), where=s[:, None] > floor)
    return SVD(vt.T, s, u.T) if tall else SVD(u, s, vt)


def _arpack(a: Array, rank: int, seed: int) -> SVD:
    start = np.random.default_rng(seed).standard_normal(min(a.shape))
    try:
        u, s, vt = scipy.sparse.linalg.svds(a, k=rank, v0=start, solver="arpack")
    except scipy.sparse.linalg.ArpackError:
        logger.warning("ARPACK did not converge on a %s matrix; eigh is used", a.shape)
        return _eigh(a, rank)
    order = np.argsort(s)[::-1]
    u, s, vt = u[:, order], s[order], vt[order]
    residual = np.linalg.norm(a @ vt.T - u * s)
    if residual > 1e-6 * np.linalg.norm(s):
        logger.warning("ARPACK left a residual of %.1e; eigh is used", residual)
        return _eigh(a, rank)
    return SVD(u, s, vt)


def _randomized(a: Array, rank: int, seed: int, tolerance: float = 5e-4) -> SVD:
    """Subspace iteration until the dropped energy changes by less than ``tolerance`` of itself."""
    width = min(min(a.shape), int(1.25 * rank) + 32)
    total = float(np.sum(a * a))
    q = np.random.default_rng(seed).standard_normal((a.shape[1], width))
    dropped = np.inf
    for iteration in range(16):
        q, _ = scipy.linalg.qr(a @ q, mode="economic", check_finite=False)
        small = q.T @ a
        captured = np.sum(top_eigh(small @ small.T, rank)[0])
        previous, dropped = dropped, max(total - captured, 0.0)
        settled = previous - dropped <= tolerance * dropped or dropped <= 1e-14 * total
        if iteration >= 4 and settled:
            svd = _eigh(small, rank)
            return SVD(q @ svd.u, svd.s, svd.vt)
        q, _ = scipy.linalg.qr(small.T, mode="economic", check_finite=False)
    if min(a.shape) > GRAM_LIMIT:
        raise NumericalError(
            f"randomized SVD of a {a.shape} matrix did not settle", hint="use backend='gesdd'"
        )
    logger.warning("randomized SVD of a %s matrix did not settle; eigh is used", a.shape)
    return _eigh(a, rank)
