"""Sparse quantization (``W8A8S``): the step of 4 bits for the bulk, up to 8 bits for outliers.

The step of each row is chosen so that all weights but a small share of outliers fall on the codes
-7 ... 7; outliers keep the larger codes that the same step gives them.  The step is coarse, so
codes crowd around 0, and a lossless compressor of weights shrinks them to about half: "sparse"
means that few codes are frequent, not that a mask removes weights.

Engines multiply codes with one scale a row.  Power-law levels (PowerQuant, arXiv:2301.09858) are
therefore stored as the int8 codes that are nearest to them, so that the linear scale of the format
stands for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from slim_core.dtypes import INT8
from slim_core.errors import InvalidValueError
from slim_core.numerics import EPS, quantize
from slim_core.scheme import Granularity, QuantScheme, TensorScheme, Variant
from slim_core.validate import check_choice, check_float, check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import finite_weight

BULK = 7  # largest code of the bulk: that of a symmetric 4-bit type

_POWERS = torch.linspace(0.4, 1.0, 31)  # candidates for the exponent of power-law levels
_FIT_ELEMENTS = 1 << 18  # on which the exponent is chosen


class Scope(str, Enum):
    """Over which weights the threshold of outliers is taken."""

    ROW = "row"  # of each output channel, the lowbit backend of the classic interface
    TENSOR = "tensor"  # of the whole weight, its co_sparse backend


@dataclass(frozen=True)
class Sparse:
    """Quantize to int8 codes most of which are 4-bit codes.

    Parameters
    ----------
    scope : Scope or str
        Whether the threshold is that of each row or of the whole weight.
    fraction : float
        Share of the weights that may be outliers, in [0.01, 0.1].  More outliers make the step
        finer: better accuracy, less compression.
    sigma_factor : float, optional
        In [3, 4]: outliers are the weights beyond so many standard deviations of ``|w|``, in the
        place of ``fraction``; row scope only.  A larger factor makes the step coarser.
    nonuniform : bool
        Place the 4-bit levels on a power law that is fitted to the weight.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of range, or ``sigma_factor`` is given for the scope of a tensor.
    """

    name: ClassVar[str] = "sparse"
    needs: ClassVar[Needs] = Needs.NONE

    scope: str = Scope.ROW
    fraction: float = 0.01
    sigma_factor: float | None = None
    nonuniform: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scope, Scope):
            scope = check_choice("scope", self.scope, [choice.value for choice in Scope])
            object.__setattr__(self, "scope", Scope(scope))
        check_float("fraction", self.fraction, low=0.01, high=0.1)
        check_type("nonuniform", self.nonuniform, bool)
        if self.sigma_factor is not None:
            check_float("sigma_factor", self.sigma_factor, low=3, high=4)
            if self.scope is not Scope.ROW:
                raise InvalidValueError("sigma_factor goes with scope 'row' only")

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why a scheme is not a sparse one."""
        return None if scheme.variant is Variant.SPARSE else "it makes w8a8s only"

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`).

        Parameters
        ----------
        scheme : TensorScheme
            Symmetric int8, per channel or per tensor.
        """
        values = finite_weight(name, weight)
        make = self._on_power_law if self.nonuniform else self._linear
        codes, scale = make(values, scheme)
        bulk = float((codes.abs() <= BULK).float().mean())
        zeros = float((codes == 0).float().mean())
        notes = (f"{bulk:.1%} of the codes have 4 bits, {zeros:.1%} are 0",)
        return Parts(codes, scale, torch.zeros_like(scale), notes=notes)

    def _linear(
        self, values: torch.Tensor, scheme: TensorScheme
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self._step(values, scheme)
        # The row backend of the classic interface uses the whole range, the other one does not.
        lowest = INT8.min if self.scope is Scope.ROW else -INT8.max
        codes: torch.Tensor = quantize(values, step, None, INT8, low=lowest)
        return codes, step

    def _on_power_law(
        self, values: torch.Tensor, scheme: TensorScheme
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the power-law levels as int8 codes, the same set of codes in every row."""
        power = _fit_power(values, self, scheme)
        ranks, step = _ranks(values, power, self, scheme)
        top = ranks.abs().amax().clamp(min=1)
        codes = torch.round(ranks.sign() * INT8.max * (ranks.abs() / top) ** (1 / power))
        scale = ((top * step) ** (1 / power) / INT8.max).clamp(min=EPS)
        return codes.to(torch.int8), scale

    def _step(self, values: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
        """Return the step, shape (out, 1) or (1,)."""
        whole = scheme.granularity is Granularity.PER_TENSOR
        size = values.abs()
        if self.scope is Scope.ROW:
            rows = size.reshape(1, -1) if whole else size
            bulk = self._bulk_of_rows(rows)
        else:
            threshold = _largest(size.reshape(1, -1), self.fraction)
            bulk = threshold if whole else _inlier_absmax(size, threshold)
        step = (bulk / BULK).clamp(min=EPS)
        return step.reshape(1) if whole else step

    def _bulk_of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude that is still of the bulk, shape (rows, 1)."""
        if self.sigma_factor is None:
            return _largest(rows, self.fraction)
        deviation = rows.std(dim=1, keepdim=True) if rows.shape[1] > 1 else torch.zeros_like(rows)
        return _inlier_absmax(rows, self.sigma_factor * deviation)


def _largest(size: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the ``int(fraction * n)``-th largest magnitude of each row, shape (rows, 1)."""
    columns = size.shape[1]
    rank = max(1, int(fraction * columns))
    return size.kthvalue(columns - rank + 1, dim=1, keepdim=True).values


def _inlier_absmax(size: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude up to the threshold in each row, (rows, 1).

    A row that has only outliers takes the threshold.
    """
    inside = size <= threshold
    largest = torch.where(inside, size, torch.zeros_like(size)).amax(dim=1, keepdim=True)
    return torch.where(inside.any(dim=1, keepdim=True), largest, threshold.expand_as(largest))


def _ranks(
    values: torch.Tensor, power: float, method: Sparse, scheme: TensorScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``q`` of the level ``sign(q) (|q| s)**(1 / power)`` of every weight, and ``s``."""
    companded = values.sign() * values.abs() ** power
    step = method._step(companded, scheme)
    return torch.round(companded / step).clamp(-INT8.max, INT8.max), step


def _fit_power(values: torch.Tensor, method: Sparse, scheme: TensorScheme) -> float:
    """Return the exponent whose levels have the least squared error on a part of the rows."""
    rows = max(1, _FIT_ELEMENTS // values.shape[1])
    part = values[:: math.ceil(values.shape[0] / rows)]

    def error(power: float) -> float:
        ranks, step = _ranks(part, power, method, scheme)
        levels = ranks.sign() * (ranks.abs() * step) ** (1 / power)
        return float(torch.dist(levels, part))

    return min((float(power) for power in _POWERS), key=error)
