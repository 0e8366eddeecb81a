"""SSZ: search scale and zero point by alternating between codes and the line that fits them.

For fixed codes the best scale and zero point are a least-squares line; for a fixed line the best
codes are the nearest.  Each step lowers the squared error or is not taken, so the error falls
monotonically (the alternation of arXiv:1911.04805 and of learned quantizers before it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.validate import check_int, check_type
from slim_ptq.methods.grid import Grid
from slim_ptq.methods.nearest import WeightedMethod
from slim_ptq.methods.search import refine_steps, shrink_range


@dataclass(frozen=True)
class SSZ(WeightedMethod):
    """Round to nearest on scales and zero points that are searched iteratively.

    Parameters
    ----------
    weighted : bool
        See :class:`~slim_ptq.methods.nearest.WeightedMethod`.
    search : bool
        Start from the best shrunk range instead of the min-max range: the alternation alone only
        finds the nearest of several minima.
    iterations : int
        At most so many alternations, in [0, 1000].

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "ssz"

    search: bool = True
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("search", self.search, bool)
        check_int("iterations", self.iterations, low=0, high=1000)

    def fit(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
        """Return the grid after the search."""
        if self.search:
            grid = shrink_range(weight, grid, importance)
        return refine_steps(weight, grid, importance, iterations=self.iterations)
