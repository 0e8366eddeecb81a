"""Range search: the share of the min-max range that loses least, for every row or group.

Outlying weights are clipped where finer steps for all others are worth more: the optimal clipping
of ACIQ (arXiv:1810.05723), found by search instead of from an assumed distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.validate import check_float, check_int
from slim_ptq.methods.grid import Grid
from slim_ptq.methods.nearest import WeightedMethod
from slim_ptq.methods.search import SMALLEST, STEPS, shrink_range


@dataclass(frozen=True)
class Clip(WeightedMethod):
    """Round to nearest on searched ranges.

    The error of a row or group is never above that of min-max.

    Parameters
    ----------
    weighted : bool
        See :class:`~slim_ptq.methods.nearest.WeightedMethod`.
    steps : int
        How finely ranges are searched, in [1, 1000]
        (:func:`slim_ptq.methods.search.shrink_range`).
    smallest : float
        Smallest of them as a share of the min-max range, in (0, 1).

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "clip"

    steps: int = STEPS
    smallest: float = SMALLEST

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("steps", self.steps, low=1, high=1000)
        check_float("smallest", self.smallest, low=1e-3, high=0.999)

    def fit(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
        """Return the best of the shrunk ranges."""
        return shrink_range(weight, grid, importance, steps=self.steps, smallest=self.smallest)
