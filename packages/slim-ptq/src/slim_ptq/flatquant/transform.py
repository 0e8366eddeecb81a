"""Learnable Kronecker-factored transforms that stay invertible while they are trained."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from slim_core.kronecker import kronecker_pair
from slim_ptq.orthogonal import Orthogonal

_ONE = math.log(math.e - 1)  # softplus of it is one


class Factor(nn.Module):
    """An invertible matrix ``Q U diag(s) V``: ``Q`` fixed, ``U`` and ``V`` rotations, ``s`` > 0.

    ``U`` and ``V`` are Cayley transforms of skew-symmetric matrices, which begin at zero, and ``s``
    is a softplus that begins at one.  The inverse costs nothing: it has ``1 / s``.

    Parameters
    ----------
    size : int
    seed : int
        Of the orthogonal ``Q``, which spreads outliers from the beginning.
    """

    start: torch.Tensor

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("start", Orthogonal(size, seed).matrix().float())
        self.outer = nn.Parameter(torch.zeros(size, size))
        self.inner = nn.Parameter(torch.zeros(size, size))
        self.spread = nn.Parameter(torch.full((size,), _ONE))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrix and the transpose of its inverse, both float32 (size, size)."""
        scale = functional.softplus(self.spread)
        before = self.start @ cayley(self.outer)
        after = cayley(self.inner)
        return (before * scale) @ after, (before / scale) @ after


class Kronecker(nn.Module):
    """The two factors that transform the input of ``channels`` channels."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        left, right = kronecker_pair(channels)
        self.left = Factor(left, seed)
        self.right = Factor(right, seed)

    def become_identity(self) -> None:
        """Go back to the transform that changes nothing."""
        with torch.no_grad():
            for factor in (self.left, self.right):
                factor.start.copy_(torch.eye(len(factor.start)))
                factor.outer.zero_()
                factor.inner.zero_()
                factor.spread.fill_(_ONE)


def cayley(free: torch.Tensor) -> torch.Tensor:
    """Return the rotation ``(I + A)⁻¹ (I - A)`` of the skew-symmetric ``A = free - freeᵀ``."""
    skew = free - free.T
    one = torch.eye(len(free), device=free.device, dtype=free.dtype)
    rotation: torch.Tensor = torch.linalg.solve(one + skew, one - skew)
    return rotation
