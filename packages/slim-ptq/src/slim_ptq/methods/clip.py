"""Range search: the share of the min-max range that loses least, for every row or group.

Outlying weights are clipped where finer steps for all others are worth more: the optimal clipping
of ACIQ (arXiv:1810.05723), found by search instead of from an assumed distribution.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.numerics import check_finite
from slim_core.scheme import QuantScheme, TensorScheme
from slim_core.validate import check_float, check_int, check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import unsupported_grid
from slim_ptq.methods.grid import fit_weight
from slim_ptq.methods.search import SMALLEST, STEPS, shrink_range


@dataclass(frozen=True)
class Clip:
    """Round to nearest on searched ranges.

    The error of a row or group is never above that of min-max.

    Parameters
    ----------
    weighted : bool
        Weight the squared error of each input channel with its mean square on the calibration
        data, so that calibration data is needed.
    steps : int
        Candidate ranges, in [1, 1000].
    smallest : float
        Smallest of them as a share of the min-max range, in (0, 1).

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "clip"

    weighted: bool = False
    steps: int = STEPS
    smallest: float = SMALLEST

    def __post_init__(self) -> None:
        check_type("weighted", self.weighted, bool)
        check_int("steps", self.steps, low=1, high=1000)
        check_float("smallest", self.smallest, low=1e-3, high=0.999)

    @property
    def needs(self) -> Needs:
        """Mean squares of the inputs, if the error is weighted with them."""
        return Needs.MOMENTS if self.weighted else Needs.NONE

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why there is no range to search, None if there is one."""
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
        fit = functools.partial(shrink_range, steps=self.steps, smallest=self.smallest)
        moments = inputs.moments if self.weighted and inputs is not None else None
        grid = fit_weight(values, scheme, fit, moments)
        return grid.parts(grid.codes(values))
