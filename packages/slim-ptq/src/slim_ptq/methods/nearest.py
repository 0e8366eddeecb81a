"""Methods that round to nearest: what they have in common beside the choice of their grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slim_core.scheme import QuantScheme, TensorScheme
from slim_core.validate import check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import finite_weight, unsupported_grid
from slim_ptq.methods.grid import Grid, fit_weight


@dataclass(frozen=True)
class NearestMethod:
    """Round to nearest on the grid that :meth:`fit` chooses for each set of weights."""

    @property
    def needs(self) -> Needs:
        """Nothing of the inputs."""
        return Needs.NONE

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why there is no grid to choose, None if there is one."""
        return unsupported_grid(scheme)

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`)."""
        values = finite_weight(name, weight)
        is_weighted = Needs.MOMENTS in self.needs
        moments = inputs.moments if inputs is not None and is_weighted else None
        grid = fit_weight(values, scheme, self.fit, moments)
        return grid.parts(grid.codes(values))

    def fit(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
        """Return the grid for sets of weights (:data:`slim_ptq.methods.grid.Fit`)."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightedMethod(NearestMethod):
    """The same, with an option to weight errors by the inputs.

    Parameters
    ----------
    weighted : bool
        Weight the squared error of each input channel with its mean square on the calibration
        data, so that calibration data is needed.
    """

    weighted: bool = False

    def __post_init__(self) -> None:
        check_type("weighted", self.weighted, bool)

    @property
    def needs(self) -> Needs:
        """Mean squares of the inputs, if the error is weighted with them."""
        return Needs.MOMENTS if self.weighted else Needs.NONE
