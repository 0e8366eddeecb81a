"""A linear layer whose rounding and steps can be learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from slim_core.dtypes import IntType
from slim_core.numerics import EPS, lowest_code
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.methods import Parts
from slim_ptq.structure import bias_of, weight_of

_EDGE = 0.01  # distance, in steps, of a start from the point where its code would change
_FACTORS = 0.5, 1.5  # of the steps


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A quantized weight from which learning starts.

    Parameters
    ----------
    parts : Parts
        Integer codes and free scales.
    scheme : TensorScheme
    """

    parts: Parts
    scheme: TensorScheme


class RoundedLinear(nn.Module):
    """A layer that computes with its quantized weight.

    A code is ``round(place + shift)``: ``place`` is the weight in steps, moved into the cell of the
    code from which learning starts where it lies in another one.  ``shift``, in [-1/2, 1/2] for
    every weight, and ``factor`` for every step are learned.  Offsets stay.

    Other than in AutoRound a factor does not move the places: codes of GPTQ make up for the errors
    of each other, and those that lie near the end of their cell would flip with any factor.

    Parameters
    ----------
    linear : nn.Module
        The float layer.
    start : Start
        Of that layer.
    """

    def __init__(self, linear: nn.Module, start: Start) -> None:
        super().__init__()
        scheme, parts = start.scheme, start.parts
        assert isinstance(scheme.dtype, IntType)  # narrowing: the method has seen to it
        weight = weight_of(linear).detach().float()
        self._parts, self._shape = parts, weight.shape
        self._lowest = lowest_code(scheme)
        self._highest = scheme.dtype.max
        whole = scheme.granularity is Granularity.PER_TENSOR
        sets = weight.reshape(1, -1) if whole else weight.reshape(parts.scale.numel(), -1)
        self._step, self._offset = (part.reshape(-1, 1) for part in (parts.scale, parts.offset))
        codes = parts.codes.reshape(sets.shape).float()
        # Beyond the ends of the grid all values have the same code.
        low = torch.where(codes > self._lowest, codes - 0.5 + _EDGE, -torch.inf)
        high = torch.where(codes < self._highest, codes + 0.5 - _EDGE, torch.inf)
        self._place = (sets / self._step + self._offset).clamp(low, high)
        self._bias = bias_of(linear)
        self.shift = nn.Parameter(torch.zeros_like(sets))
        self.factor = nn.Parameter(torch.ones_like(self._step))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for inputs (..., in)."""
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, (out, in); gradients pass through the rounding."""
        return ((self._codes() - self._offset) * self._steps()).reshape(self._shape)

    def step(self, shift: torch.Tensor, factor: torch.Tensor) -> None:
        """Take a step off what is learned, and stay in its range."""
        self.shift.data.sub_(shift).clamp_(-0.5, 0.5)
        self.factor.data.sub_(factor).clamp_(*_FACTORS)

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of what is learned."""
        return self.shift.detach().clone(), self.factor.detach().clone()

    def go(self, share: float, end: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go a share of the way from the start, where a shift is 0 and a factor 1, to an end."""
        shift, factor = end
        self.shift.data.copy_(share * shift)
        self.factor.data.copy_(1 + share * (factor - 1))

    def parts(self, note: str) -> Parts:
        """Return codes and scales as they are now."""
        with torch.no_grad():
            codes = self._codes().reshape(self._shape).to(torch.int8)
            scale = self._steps().reshape(self._parts.scale.shape)
        return replace(self._parts, codes=codes, scale=scale, notes=(*self._parts.notes, note))

    def _steps(self) -> torch.Tensor:
        return (self._step * self.factor).clamp(min=EPS)

    def _codes(self) -> torch.Tensor:
        at = self._place + self.shift
        return (at + (at.round() - at).detach()).clamp(self._lowest, self._highest)
