"""Low-rank approximation of a linear map in the metric of its data.

For ``y = W x`` with ``Sigma = E[x x^T]`` and, optionally, ``Gamma = E[g g^T]`` of the gradients
``g`` of the loss with respect to ``y``, the rank-r map ``A`` with the least
``tr(Gamma (W - A) Sigma (W - A)^T)`` is a projection of the outputs::

    A = Gamma^(-1/2) U U^T Gamma^(1/2) W,   U = leading eigenvectors of Gamma^(1/2) K Gamma^(1/2)

with ``K = W Sigma W^T = E[y y^T]``.  With ``Gamma = I`` this is the same optimum as whitening by a
Cholesky factor of ``Sigma`` (SVD-LLM, arXiv 2403.07378), but nothing is inverted, so ``Sigma`` may
be singular; the dropped eigenvalues are the error at every rank at once.  With ``Gamma`` they
estimate twice the rise of the loss (Kronecker-factored Fisher), which makes layers comparable.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.linalg

from slim_core.errors import NumericalError
from slim_core.validate import check_int
from slim_lowrank.factorize import Array, balance, check_matrix

GAMMA_DAMPING = 0.1
"""Share of the mean gradient energy that every output gets: few samples do not show them all."""
SHRINKAGE = 1e-4
"""Share of the mean input energy that every input gets, against over-fitting the calibration."""


def shrink(second: Array, share: float) -> Array:
    """Return a second moment with ``share`` of its mean eigenvalue added to the diagonal."""
    n = second.shape[0]
    return np.asarray(second + (share * np.trace(second) / n) * np.eye(n))


def symmetric_power(matrix: Array, exponent: float, floor: float = 1e-12) -> Array:
    """Return a real power of a positive semidefinite matrix, eigenvalues floored relatively."""
    values, vectors = scipy.linalg.eigh(matrix, check_finite=False)
    values = np.maximum(values, floor * max(float(values[-1]), np.finfo(float).tiny))
    powered = (vectors * values**exponent) @ vectors.T
    return np.asarray((powered + powered.T) / 2)


class MatrixProblem:
    """All low-rank approximations of one matrix in one metric; everything is computed once.

    Parameters
    ----------
    weight : array, shape (m, n)
        The map ``W``.
    second : array, shape (n, n), optional
        ``Sigma``; identity if neither it nor ``output`` is given.
    output : array, shape (m, m), optional
        ``K`` itself, where outputs were observed instead of inputs.
    gamma : array, shape (m, m), optional
        ``Gamma``, positive definite.
    name : str
        What errors call the layer.

    Raises
    ------
    NumericalError
        NaN or infinity in the weight or the statistics.
    """

    def __init__(
        self,
        weight: Array,
        *,
        second: Array | None = None,
        output: Array | None = None,
        gamma: Array | None = None,
        name: str = "weight",
    ) -> None:
        self.name = name
        self.weight = check_matrix(f"weight of {name}", weight)
        self.second = None if second is None else check_matrix(f"statistics of {name}", second)
        self.output = None if output is None else check_matrix(f"statistics of {name}", output)
        self.gamma = None if gamma is None else check_matrix(f"gradients of {name}", gamma)

    @cached_property
    def output_second(self) -> Array:
        """``K (m, m)``."""
        if self.output is not None:
            return self.output
        if self.second is None:
            return np.asarray(self.weight @ self.weight.T)
        return np.asarray(self.weight @ self.second @ self.weight.T)

    @cached_property
    def _gamma_root(self) -> Array | None:
        return None if self.gamma is None else symmetric_power(self.gamma, 0.5)

    @cached_property
    def _gamma_inverse_root(self) -> Array | None:
        return None if self.gamma is None else symmetric_power(self.gamma, -0.5)

    @cached_property
    def _spectrum(self) -> tuple[Array, Array]:
        """Eigenvalues, descending, and the basis ``U``; from the shorter side."""
        m, n = self.weight.shape
        root = self._gamma_root
        try:
            if m <= n or self.output is not None:
                k = self.output_second if root is None else root @ self.output_second @ root
                values, u = scipy.linalg.eigh(k, check_finite=False)
                return np.maximum(values[::-1], 0.0)[: min(m, n)], u[:, ::-1][:, : min(m, n)]
            weighted = self.weight if root is None else root @ self.weight
            if self.second is not None:
                weighted = weighted @ symmetric_power(self.second, 0.5)
            values, v = scipy.linalg.eigh(weighted.T @ weighted, check_finite=False)
            u, _ = scipy.linalg.qr(weighted @ v[:, ::-1], mode="economic", check_finite=False)
            return np.maximum(values[::-1], 0.0), u
        except scipy.linalg.LinAlgError as error:
            raise NumericalError(f"the eigenvalues of {self.name} did not converge") from error

    @property
    def max_rank(self) -> int:
        """Shorter side of the weight."""
        return int(min(self.weight.shape))

    @cached_property
    def losses(self) -> Array:
        """``losses[r]``: the least weighted squared error at rank ``r``, for ``r = 0 ... max``."""
        tails = np.cumsum(self._spectrum[0][::-1])[::-1]
        return np.append(tails, 0.0)

    def factors(self, rank: int) -> tuple[Array, Array]:
        """Return ``first (r, n)`` and ``last (m, r)`` with ``A = last @ first``, norms balanced."""
        check_int(f"rank of {self.name}", rank, low=1, high=self.max_rank)
        down, up = self._projection(rank)
        return balance(down @ self.weight, up)

    def projection(self, rank: int) -> Array:
        """Return the ``(m, m)`` projection ``P`` of the outputs with ``A = P W``."""
        down, up = self._projection(rank)
        return np.asarray(up @ down)

    def _projection(self, rank: int) -> tuple[Array, Array]:
        u = self._spectrum[1][:, :rank]
        if self._gamma_root is None or self._gamma_inverse_root is None:
            return u.T, u
        return u.T @ self._gamma_root, self._gamma_inverse_root @ u
