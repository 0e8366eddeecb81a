"""Learned rounding: which way each weight is rounded, and how wide steps are.

SignRound of AutoRound (Cheng et al., arXiv:2309.05516): a shift in [-1/2, 1/2] of every weight
before rounding and factors of every range follow the *sign* of their gradients.

Where a model is quantized block by block, all layers of a block are learned together on the error
of its output, starting from what GPTQ gives (:mod:`slim_ptq.rounding`).  A layer alone is learned
on its own output error ``tr(E H Eᵀ)`` over all calibration data, so that each step sees all of it
at the cost of one product with ``H``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.dtypes import IntType
from slim_core.numerics import EPS, check_finite, lowest_code, split_groups
from slim_core.scheme import Granularity, QuantScheme, ScaleKind, TensorScheme
from slim_core.validate import check_float, check_int
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import finite_weight, required_hessian, unsupported_grid
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.methods.grid import Grid, WeightGrid


@dataclass(frozen=True)
class SignRound:
    """Minimize the output error of a block, or of a layer alone, by signed gradient descent.

    The error of a block is not above that of GPTQ.  Each row of a layer alone keeps the best that
    it met on the way, so its error is never above that of rounding to nearest between the extremes.

    Parameters
    ----------
    iterations : int
        In [0, 100000]; 0 is GPTQ in a block, rounding to nearest in a layer alone.
    rate : float, optional
        Of the first step, falling linearly to 0.  If not given, ``1 / iterations`` in a layer
        alone, with which every weight can just reach either neighbour, and a quarter of that in a
        block, where learning starts from codes that fit each other.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "signround"
    needs: ClassVar[Needs] = Needs.HESSIAN | Needs.BLOCK

    iterations: int = 200
    rate: float | None = None

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, low=0, high=100_000)
        if self.rate is not None:
            check_float("rate", self.rate, low=1e-6, high=1)

    @property
    def first_rate(self) -> float:
        """The rate of the first step in a layer alone."""
        return self.rate or 1 / max(self.iterations, 1)

    @property
    def block_rate(self) -> float:
        """The rate of the first step in a block."""
        return self.rate or 0.25 / max(self.iterations, 1)

    def start(
        self, name: str, weight: torch.Tensor, scheme: TensorScheme, inputs: LayerInputs
    ) -> Parts:
        """Return the codes from which the block of a layer is learned."""
        return GPTQ().quantize(name, weight, scheme, inputs)

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why rounding cannot be learned, None if it can."""
        weight = scheme.weight
        if weight is not None and (
            not isinstance(weight.dtype, IntType) or weight.scales is not ScaleKind.FLOAT
        ):
            return "learned rounding needs integer codes and free scales"
        return unsupported_grid(scheme)

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`)."""
        if inputs is not None and isinstance(inputs.learned, Parts):
            return inputs.learned
        hessian = required_hessian(self.name, name, inputs)
        check_finite(name, "mean of x xᵀ", hessian)
        learned = _Learned(finite_weight(name, weight), scheme)
        with torch.enable_grad():
            for step in range(self.iterations):
                learned.step(hessian, self.first_rate * (1 - step / self.iterations))
        return learned.parts(hessian)


class _Learned:
    """What is learned of one weight, in sets that share a scale."""

    def __init__(self, weight: torch.Tensor, scheme: TensorScheme) -> None:
        assert isinstance(scheme.dtype, IntType)  # narrowing: unsupported() has seen to it
        self._weight = weight
        self._scheme = scheme
        self._dtype = scheme.dtype
        whole = scheme.granularity is Granularity.PER_TENSOR
        self._size = weight.numel() if whole else scheme.group_size or weight.shape[1]
        if scheme.group_size:
            split_groups(weight, scheme.group_size)  # which raises where groups do not fit
        self._sets = weight.reshape(-1, self._size)
        self._low, self._high = self._sets.aminmax(dim=1, keepdim=True)
        if not scheme.symmetric:
            self._low, self._high = self._low.clamp(max=0), self._high.clamp(min=0)
        ones = torch.ones_like(self._low)
        self._free = [torch.zeros_like(self._sets), ones, ones.clone()]
        self._best = [item.clone() for item in self._free]
        rows = 1 if whole else weight.shape[0]
        self._loss = weight.new_full((rows, 1), torch.inf)
        for item in self._free:
            item.requires_grad_()

    def step(self, hessian: torch.Tensor, rate: float) -> None:
        """Note the error as it is, and move against the signs of its gradients."""
        values = self._values()
        slope = self._note(values, hessian)
        gradients = torch.autograd.grad(values, self._free, slope, allow_unused=True)
        shift, *factors = self._free
        with torch.no_grad():
            for item, gradient in zip(self._free, gradients, strict=True):
                if gradient is not None:
                    item.sub_(gradient.sign_(), alpha=rate)
            shift.clamp_(-0.5, 0.5)
            for factor in factors:
                factor.clamp_(0, 1)

    def parts(self, hessian: torch.Tensor) -> Parts:
        """Return the best codes that were met."""
        with torch.no_grad():
            self._note(self._values(), hessian)
            shift, *factors = self._best
            scale, offset = self._grid(*factors)
            grid = Grid(self._scheme, scale, offset)
            codes = grid.codes(self._sets + shift * scale).reshape(self._weight.shape)
            shape = (len(self._loss), -1)
            return WeightGrid(self._scheme, scale.reshape(shape), offset.reshape(shape)).parts(
                codes
            )

    def _note(self, values: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """Keep what is best so far; returns the gradient of the error with respect to values."""
        with torch.no_grad():
            error = values.reshape(self._weight.shape) - self._weight
            slope = error @ hessian
            loss = (slope * error).reshape(len(self._loss), -1).sum(dim=1, keepdim=True)
            better = loss < self._loss
            self._loss = torch.where(better, loss, self._loss)
            sets = better.repeat_interleave(len(self._sets) // len(better), dim=0)
            for place, item in enumerate(self._free):
                self._best[place] = torch.where(sets, item, self._best[place])
            return slope.reshape(self._sets.shape)

    def _values(self) -> torch.Tensor:
        shift, *factors = self._free
        scale, offset = self._grid(*factors)
        codes = _round(self._sets / scale + offset + shift)
        return (codes.clamp(lowest_code(self._scheme), self._dtype.max) - offset) * scale

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of clipped ranges, differentiable."""
        low, high = self._low * low, self._high * high
        if self._scheme.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / self._dtype.max
            return scale.clamp(min=EPS), torch.zeros_like(scale)
        scale = ((high - low) / (self._dtype.max - self._dtype.min)).clamp(min=EPS)
        return scale, _round(-low / scale) + self._dtype.min


def _round(x: torch.Tensor) -> torch.Tensor:
    """Round; the gradient passes straight through."""
    return x + (x.round() - x).detach()
