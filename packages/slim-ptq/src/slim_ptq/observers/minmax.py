"""Ranges from the extremes of the samples."""

from __future__ import annotations

import torch

from slim_ptq.observers.base import Observer


class MinMaxObserver(Observer):
    """Minimum and maximum over all samples: nothing seen in calibration is clipped."""

    def __init__(self) -> None:
        self._low = torch.full((1,), torch.inf)
        self._high = torch.full((1,), -torch.inf)

    def _add(self, x: torch.Tensor) -> None:
        low, high = (end.float().reshape(1) for end in torch.aminmax(x))
        self._low = torch.minimum(low, self._low.to(low.device))
        self._high = torch.maximum(high, self._high.to(high.device))

    def _join(self, other: MinMaxObserver) -> None:
        self._low = torch.minimum(self._low, other._low.to(self._low.device))
        self._high = torch.maximum(self._high, other._high.to(self._high.device))

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._low, self._high


class MeanMinMaxObserver(Observer):
    """Mean over the samples of their minima and of their maxima.

    One extreme sample does not widen the range for all of them.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update_rows(self, x: torch.Tensor) -> None:
        """Take in each entry of the first axis as a sample of its own, all at once."""
        if x.numel():
            low, high = torch.aminmax(x.detach().reshape(x.shape[0], -1), dim=1)
            self.samples += x.shape[0]
            self._sums = self._sums.to(x.device) + torch.stack([low, high]).double().sum(1)

    def _add(self, x: torch.Tensor) -> None:
        self._sums = self._sums.to(x.device) + torch.stack(torch.aminmax(x)).double()

    def _join(self, other: MeanMinMaxObserver) -> None:
        self._sums = self._sums + other._sums.to(self._sums.device)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (self._sums / self.samples).float()
        return low.reshape(1), high.reshape(1)
