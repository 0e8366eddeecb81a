"""Grids that lose less than the one between the extremes: shrunk ranges, refined steps.

Both only ever accept what lowers the error of a set, so neither is worse than what it starts from.
"""

from __future__ import annotations

import torch

from slim_core.dtypes import TableType
from slim_core.numerics import EPS
from slim_core.scheme import ScaleKind
from slim_ptq.methods.grid import Grid

STEPS = 40  # candidate ranges; more of them change the fourth digit of the error
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

    Both ends are pulled in by the same factor, so that zero points stay where they are.

    Parameters
    ----------
    weight : torch.Tensor
        float32, shape (sets, k).
    importance : torch.Tensor, optional
        Non-negative, shape (sets, k).
    """
    best, lowest = grid, grid.error(weight, importance)
    for factor in _factors(grid, steps, smallest):
        other = grid.moved(grid.scale * factor, grid.offset)
        error = other.error(weight, importance)
        better = error < lowest
        best, lowest = best.where(better, other), torch.where(better, error, lowest)
    return best


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


def _factors(grid: Grid, steps: int, smallest: float) -> list[float]:
    if grid.scheme.scales is ScaleKind.E8M0:
        return [2.0, 0.5]  # the format rounds down; others differ by more than a place
    return [1 - (1 - smallest) * index / steps for index in range(1, steps + 1)]


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
