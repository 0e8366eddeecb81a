"""Orthogonal matrices that spread every channel over all others, and products with them.

A randomized Hadamard matrix has entries of one magnitude, so it spreads an outlier evenly.  There
is none for most sizes; a size ``2**k * m`` gets the Kronecker product of a Hadamard matrix and the
nearest thing for the odd part.  Kronecker factors also make a product with a matrix of ``n``
columns cost ``n * sum(factors)`` instead of ``n * n`` a row.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

_LARGEST = 64  # side of a power-of-two factor: larger ones cost more than they spread


class Orthogonal:
    """An orthogonal matrix ``Q = diag(signs) (F1 ⊗ F2 ⊗ ...)``, never written out.

    Parameters
    ----------
    size : int
        Number of rows and columns.
    seed : int
        Of the signs, and of the factor for a size without a Hadamard matrix.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        generator = np.random.default_rng([seed, size])
        self._signs = torch.from_numpy(generator.choice([-1.0, 1.0], size))
        self._factors = [torch.from_numpy(part) for part in _factors(size, generator)]

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ Q`` for ``x`` of shape (..., size), in float64."""
        y = x.double() * self._signs.to(x.device)
        return self._along(y)

    def left(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``Qᵀ @ x`` for ``x`` of shape (size, ...), in float64."""
        moved: torch.Tensor = self.right(x.movedim(0, -1)).movedim(-1, 0)
        return moved

    def matrix(self) -> torch.Tensor:
        """Return ``Q``, float64, shape (size, size)."""
        return self.right(torch.eye(self.size, dtype=torch.float64))

    def _along(self, y: torch.Tensor) -> torch.Tensor:
        shape = y.shape
        sides = [len(factor) for factor in self._factors]
        y = y.reshape(-1, *sides)
        for axis, factor in enumerate(self._factors, 1):
            y = torch.tensordot(y, factor.to(y.device), ([axis], [0])).movedim(-1, axis)
        return y.reshape(shape)


def _factors(size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Return orthogonal matrices whose sides multiply to ``size``."""
    power = (size & -size).bit_length() - 1
    odd = size >> power
    factors = []
    if odd > 1:
        special = _special(odd, power)
        if special is not None:
            side, matrix = special
            power -= int(math.log2(side // odd))
            factors.append(matrix / math.sqrt(side))
        else:
            square = generator.standard_normal((odd, odd))
            factors.append(np.linalg.qr(square)[0])
    while power:
        step = min(power, int(math.log2(_LARGEST)))
        sylvester = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * step)
        factors.append(sylvester / math.sqrt(1 << step))
        power -= step
    return factors or [np.ones((1, 1))]


def _special(odd: int, power: int) -> tuple[int, np.ndarray] | None:
    """Return a Hadamard matrix of side ``odd * 4`` or ``odd * 8`` by Paley, if there is one."""
    for twos in (2, 3):
        side = odd << twos
        if twos > power:
            break
        if _is_prime(side - 1) and (side - 1) % 4 == 3:
            return side, paley_one(side - 1)
        if _is_prime(side // 2 - 1) and (side // 2 - 1) % 4 == 1:
            return side, paley_two(side // 2 - 1)
    return None


def paley_one(prime: int) -> np.ndarray:
    """Return the Hadamard matrix of side ``prime + 1`` for a prime that is 3 modulo 4."""
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:] = 1
    skew[1:, 0] = -1
    skew[1:, 1:] = _residues(prime)
    return skew + np.eye(prime + 1)


def paley_two(prime: int) -> np.ndarray:
    """Return the Hadamard matrix of side ``2 * prime + 2`` for a prime that is 1 modulo 4."""
    symmetric = np.ones((prime + 1, prime + 1))
    symmetric[0, 0] = 0
    symmetric[1:, 1:] = _residues(prime)
    off = np.array([[1, 1], [1, -1]])
    on = np.array([[1, -1], [-1, -1]])
    return np.kron(symmetric, off) + np.kron(np.eye(prime + 1), on)


def _residues(prime: int) -> np.ndarray:
    """Return the Jacobsthal matrix: the quadratic character of differences modulo a prime."""
    character = -np.ones(prime)
    character[np.unique(np.arange(1, prime) ** 2 % prime)] = 1
    character[0] = 0
    index = np.arange(prime)
    table: np.ndarray = character[(index[:, None] - index[None, :]) % prime]
    return table


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % part for part in range(2, math.isqrt(number) + 1))
