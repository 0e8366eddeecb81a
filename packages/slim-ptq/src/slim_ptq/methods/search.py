"""Grids that lose less than the one between the extremes: shrunk ranges, refined steps.

Both only ever accept what lowers the error of a set, so neither is worse than what it starts from.
"""

from __future__ import annotations

import torch

from slim_core.dtypes import TableType
from slim_core.numerics import EPS
from slim_core.scheme import ScaleKind
from slim_ptq.methods.grid import Grid

STEPS = 40  # more of them change the fourth digit of the error
_STRIDE = 3  # steps between the ranges tried first: half the work, and no more error than with 1
SMALLEST = 0.2  # share of the range; Gaussian weights on 2 bits want 0.3 to 0.5


def shrink_range(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor | None = None,
    *,
    steps: int = STEPS,
    smallest: float = SMALLEST,
) -> Grid:
    """Return the best of the grids whose range is a share of that of ``grid``.

    Both ends are pulled in by the same factor, so that zero points stay where they are.  Every
    third of the ``steps`` from the whole range to the ``smallest`` share is tried, then the
    neighbours of the best, down to half a step.

    Parameters
    ----------
    weight : torch.Tensor
        float32, shape (sets, k).
    importance : torch.Tensor, optional
        Non-negative, shape (sets, k).
    """
    found = _Best(weight, grid, importance)
    if grid.scheme.scales is ScaleKind.E8M0:
        # The format rounds down; other powers of two differ by more than a place.
        for factor in (2.0, 0.5):
            found.offer(grid.scale * factor)
        return found.grid
    step = (1 - smallest) / steps
    stride = min(_STRIDE, steps)
    for index in range(stride, steps + 1, stride):
        found.offer(grid.scale * (1 - step * index))
    for finer in _finer(stride):
        middle = found.grid.scale
        for side in (-finer, finer):
            scale = middle + grid.scale * (side * step)
            found.offer(scale.clamp(grid.scale * smallest, grid.scale))
    return found.grid


class _Best:
    """The best grid of each set among those that were offered."""

    def __init__(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> None:
        self.grid = grid
        self._first = grid
        self._weight, self._importance = weight, importance
        self._lowest = grid.error(weight, importance)

    def offer(self, scale: torch.Tensor) -> None:
        """Take the first grid with another scale for the sets where it loses less."""
        other = self._first.moved(scale, self._first.offset)
        error = other.error(self._weight, self._importance)
        better = error < self._lowest
        self.grid = self.grid.where(better, other)
        self._lowest = torch.where(better, error, self._lowest)


def _finer(stride: int) -> list[float]:
    """Return the distances, in steps, at which neighbours of the best range are tried."""
    found: list[float] = []
    while stride > 1:
        stride = -(-stride // 2)
        found.append(stride)
    return [*found, 0.5]


def refine_steps(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor | None = None,
    *,
    iterations: int = 20,
) -> Grid:
    """Return the grid after alternating between codes and the scale and offset that fit them best.

    For given codes scale and offset are those of a (weighted) least-squares line, the offset
    rounded to an integer and the scale fitted to that.  Ends when no set improves.
    """
    ones = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    best, lowest = grid, grid.error(weight, importance)
    for _ in range(iterations):
        other = _least_squares(weight, best, ones)
        error = other.error(weight, importance)
        better = error < lowest
        if not bool(better.any()):
            break
        best, lowest = best.where(better, other), torch.where(better, error, lowest)
    return best


def search_steps(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Grid:
    """Return the best shrunk range, refined."""
    return refine_steps(weight, shrink_range(weight, grid, importance), importance)


def _least_squares(weight: torch.Tensor, grid: Grid, importance: torch.Tensor) -> Grid:
    codes = grid.codes(weight)
    if grid.scheme.symmetric or isinstance(grid.scheme.dtype, TableType):
        levels = grid.values(codes) / grid.scale
        return grid.moved(_slope(weight, levels, importance, grid), grid.offset)
    total = importance.sum(dim=1, keepdim=True).clamp(min=EPS)
    code_mean = (importance * codes).sum(dim=1, keepdim=True) / total
    weight_mean = (importance * weight).sum(dim=1, keepdim=True) / total
    slope = _slope(weight - weight_mean, codes - code_mean, importance, grid)
    offset = (code_mean - weight_mean / slope).round()
    dtype = grid.scheme.dtype
    offset = offset.clamp(dtype.min, dtype.max)  # zero stays a level
    return grid.moved(_slope(weight, codes - offset, importance, grid), offset)


def _slope(
    weight: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the scale that fits levels to weights; that of the grid where none does."""
    weighted = importance * levels
    square = (weighted * levels).sum(dim=1, keepdim=True)
    slope = (weighted * weight).sum(dim=1, keepdim=True) / square
    return torch.where(torch.isfinite(slope) & (slope > EPS), slope, grid.scale)
