"""HQQ: half-quadratic quantization, without calibration data.

Badri and Shaji, 2023 (https://mobiusml.github.io/hqq_blog/).  The error of the weight is measured
in a norm with p < 1, which forgives a few large errors, those of outliers.  It is split into a
sparse part ``e``, found by shrinkage of the residual, and a part that scale or zero point fit::

    e = shrink_p(W - W_q, beta)
    asymmetric:  z = mean(q - (W - e) / s)        symmetric:  s = <W - e, q> / <q, q>

``beta`` grows from step to step.  A step that does not lower the p-norm of the residual of a set is
not taken for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from slim_core.dtypes import IntType, TableType
from slim_core.numerics import EPS
from slim_core.validate import check_float, check_int, check_type
from slim_ptq.methods.grid import Grid
from slim_ptq.methods.nearest import NearestMethod


@dataclass(frozen=True)
class HQQ(NearestMethod):
    """Round to nearest on scales or zero points that a robust norm chooses.

    Parameters
    ----------
    norm : float
        The exponent p, in (0, 1].  The paper has 0.7, under which held-out text is predicted worse.
    beta, growth : float
        Weight of the splitting and its factor a step; at least 1e-3 and 1.  The paper has 10 for
        residuals as they are, which forgives next to none; here they count in steps of the grid.
    iterations : int
        At most so many steps, in [0, 1000].
    float_offset : bool
        Keep zero points of asymmetric weights fractional, as the paper does.  They lower the error
        and are stored as float32; engines that keep integer zero points cannot read them.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "hqq"

    norm: float = 1.0
    beta: float = 1.0
    growth: float = 1.01
    iterations: int = 20
    float_offset: bool = False

    def __post_init__(self) -> None:
        check_float("norm", self.norm, low=0.01, high=1)
        check_float("beta", self.beta, low=1e-3)
        check_float("growth", self.growth, low=1)
        check_int("iterations", self.iterations, low=0, high=1000)
        check_type("float_offset", self.float_offset, bool)

    def objective(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return the sum of ``|w - q|**p`` of each set, shape (sets, 1)."""
        residual = weight - grid.values(grid.codes(weight))
        return residual.abs_().pow_(self.norm).sum(dim=1, keepdim=True)

    def fit(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
        """Return the grid with the least objective that was met."""
        best, lowest = grid, self.objective(weight, grid)
        if self._is_free(grid):
            grid = self._between_extremes(weight, grid)
            objective = self.objective(weight, grid)
            better = objective < lowest
            best, lowest = best.where(better, grid), torch.where(better, objective, lowest)
        grid, beta = best, self.beta
        for _ in range(self.iterations):
            grid = self._step(weight, grid, beta)
            objective = self.objective(weight, grid)
            better = objective < lowest
            if not bool(better.any()):
                break
            best, lowest = best.where(better, grid), torch.where(better, objective, lowest)
            beta *= self.growth
        return best

    def _is_free(self, grid: Grid) -> bool:
        """Whether zero points are fractions."""
        return (
            self.float_offset
            and isinstance(grid.scheme.dtype, IntType)
            and (not grid.scheme.symmetric)
        )

    @staticmethod
    def _between_extremes(weight: torch.Tensor, grid: Grid) -> Grid:
        """Return the grid whose ends are the extremes, as no whole zero point allows."""
        low, high = weight.aminmax(dim=1, keepdim=True)
        low, high = low.clamp(max=0), high.clamp(min=0)
        dtype = grid.scheme.dtype
        assert isinstance(dtype, IntType)  # narrowing: tables have no zero points
        scale = ((high - low) / (dtype.max - dtype.min)).clamp(min=EPS)
        return replace(grid, scale=scale, offset=dtype.min - low / scale)

    def _step(self, weight: torch.Tensor, grid: Grid, beta: float) -> Grid:
        codes = grid.codes(weight)
        values = grid.values(codes)
        # The shrinkage is not scale-free: residuals count in units of the step.
        dense = weight - grid.scale * self._sparse((weight - values) / grid.scale, beta)
        if grid.scheme.symmetric or isinstance(grid.scheme.dtype, TableType):
            levels = values / grid.scale
            square = levels.square().sum(dim=1, keepdim=True)
            scale = (dense * levels).sum(dim=1, keepdim=True) / square
            usable = torch.isfinite(scale) & (scale > EPS)
            return grid.moved(torch.where(usable, scale, grid.scale), grid.offset)
        offset = (codes - dense / grid.scale).mean(dim=1, keepdim=True)
        dtype = grid.scheme.dtype
        assert isinstance(dtype, IntType)
        if not self.float_offset:
            offset = offset.round()
        return replace(grid, offset=offset.clamp(dtype.min, dtype.max))

    def _sparse(self, residual: torch.Tensor, beta: float) -> torch.Tensor:
        """Return the generalized soft-thresholding of a residual."""
        size = residual.abs()
        threshold = size.clamp(min=EPS).pow(self.norm - 1) / beta
        return residual.sign() * (size - threshold).clamp_(min=0)
