"""How extreme an activation is against its spread: the measure of automatic fallback."""

from __future__ import annotations

import math

import torch

from slim_ptq.observers.score import InputScore


class SpreadObserver(InputScore):
    """Largest magnitude over standard deviation of the input of a layer.

    The standard deviation is taken after each channel is shifted by the sum of its extremes in the
    sample, and the largest of all samples counts.  A large ratio means that a few elements stretch
    the range so far that the bulk gets few codes.
    """

    def __init__(self) -> None:
        self._peak = 0.0
        self._std = 0.0

    def update(self, x: torch.Tensor) -> None:
        """Take in a sample of shape (..., channels)."""
        values = x.detach().reshape(-1, x.shape[-1]).float()
        if values.numel() < 2:
            return
        low, high = torch.aminmax(values, dim=0)
        self._peak = max(self._peak, float(high.max().abs()), float(low.min().abs()))
        self._std = max(self._std, float((values - (low + high)).std()))

    def merge(self, other: SpreadObserver) -> None:
        """Take in what another one has seen."""
        self._peak = max(self._peak, other._peak)
        self._std = max(self._std, other._std)

    def value(self) -> float:
        """Return the ratio; 0 if no sample came, infinite if all elements were equal."""
        if self._peak == 0.0:
            return 0.0
        return self._peak / self._std if self._std > 0 else math.inf
