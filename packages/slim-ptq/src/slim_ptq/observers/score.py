"""Measures of how hard the input of a layer is to quantize; a larger one is harder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch

_EVERY = 100  # one of so many sorted elements of a sample is kept
_CODES = 127


class InputScore(ABC):
    """Sees the samples that enter a layer and condenses them to one number."""

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Take in a sample of shape (..., channels)."""

    @abstractmethod
    def value(self) -> float:
        """Return the measure; 0 if no sample came."""

    def update_rows(self, x: torch.Tensor) -> None:
        """Take in each entry of the first axis as a sample of its own."""
        for row in x:
            self.update(row)

    def watch(self, x: torch.Tensor) -> None:
        """Take in a batch, shape (rows, tokens, channels), or (tokens, channels) of an expert."""
        if x.ndim == 3:
            self.update_rows(x)
        else:
            self.update(x)


class QuantileScore(InputScore):
    """The step of symmetric int8 over the distance of the quartiles.

    Quartiles are those of every hundredth element of the sorted samples, pooled.
    """

    def __init__(self) -> None:
        self._peak = 0.0
        self._kept: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        """Take in a sample of any shape."""
        if not x.numel():
            return
        values = x.detach().flatten().float().sort().values
        self._peak = max(self._peak, float(values[0].abs()), float(values[-1].abs()))
        enough = len(values) > _EVERY // 2
        self._kept.append((values[_EVERY // 2 :: _EVERY] if enough else values).cpu())

    def value(self) -> float:
        """Return the ratio; infinite if the quartiles coincide."""
        if self._peak == 0.0:
            return 0.0
        pooled = torch.cat(self._kept).numpy()
        low, high = (float(part) for part in np.quantile(pooled, (0.25, 0.75)))
        return self._peak / _CODES / (high - low) if high > low else math.inf


class KurtosisScore(InputScore):
    """Kurtosis of all elements: 3 for a normal distribution, more for heavier tails."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: torch.Tensor) -> None:
        """Take in a sample of any shape."""
        values = x.detach().flatten().double()
        self._count += values.numel()
        self._sums += torch.stack([(values**power).sum() for power in range(1, 5)]).cpu()

    def value(self) -> float:
        """Return the fourth central moment over the squared variance."""
        if not self._count:
            return 0.0
        m1, m2, m3, m4 = (float(total) / self._count for total in self._sums)
        variance = m2 - m1**2
        if variance <= 0:
            return 0.0
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2
