"""SSZ: search scale and zero point by alternating between codes and the line that fits them.

For fixed codes the best scale and zero point are a least-squares line; for a fixed line the best
codes are the nearest.  Each step lowers the squared error or is not taken, so the error falls
monotonically (the alternation of arXiv:1911.04805 and of learned quantizers before it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.numerics import check_finite
from slim_core.scheme import QuantScheme, TensorScheme
from slim_core.validate import check_int, check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import unsupported_grid
from slim_ptq.methods.grid import Grid, fit_weight
from slim_ptq.methods.search import refine_steps, shrink_range


@dataclass(frozen=True)
class SSZ:
    """Round to nearest on scales and zero points that are searched iteratively.

    Parameters
    ----------
    weighted : bool
        Weight the squared error of each input channel with its mean square on the calibration
        data, so that calibration data is needed.
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

    weighted: bool = False
    search: bool = True
    iterations: int = 20

    def __post_init__(self) -> None:
        check_type("weighted", self.weighted, bool)
        check_type("search", self.search, bool)
        check_int("iterations", self.iterations, low=0, high=1000)

    @property
    def needs(self) -> Needs:
        """Mean squares of the inputs, if the error is weighted with them."""
        return Needs.MOMENTS if self.weighted else Needs.NONE

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why there is no scale to search, None if there is one."""
        return unsupported_grid(scheme)

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`)."""
        values = weight.detach().float()
        check_finite(name, "weight", values)
        moments = inputs.moments if self.weighted and inputs is not None else None
        grid = fit_weight(values, scheme, self._fit, moments)
        return grid.parts(grid.codes(values))

    def _fit(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
        if self.search:
            grid = shrink_range(weight, grid, importance)
        return refine_steps(weight, grid, importance, iterations=self.iterations)
