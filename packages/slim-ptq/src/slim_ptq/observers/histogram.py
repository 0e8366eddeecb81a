"""The range with the smallest expected quantization error, searched on a histogram."""

from __future__ import annotations

import math

import torch

from slim_ptq.observers.base import Observer

_LEVELS = 255  # steps of an 8-bit range
_EXACT = 1 << 24  # up to where float32, in which torch counts, has every integer


class HistogramObserver(Observer):
    """Running histogram with real-valued bounds, and a search of the range on it.

    Narrowing the range makes the step finer for the bulk and clips the tails.  The candidates drop
    the bins of the lighter tail first; each is rated by the expected squared error, that is
    ``step**2 / 12`` for what stays inside and the squared distance to the bound for what is
    clipped, and the best one wins.

    Parameters
    ----------
    bins : int
        Number of bins; the range of the bins grows by merging pairs, so no sample is kept.
    """

    def __init__(self, bins: int = 2048) -> None:
        self._bins = bins
        self._counts = torch.zeros(bins, dtype=torch.float64)
        self._origin = 0.0  # left edge of the first bin
        self._width = 0.0  # width of a bin
        self._low = math.inf
        self._high = -math.inf

    def _add(self, x: torch.Tensor) -> None:
        values = x.reshape(-1).float()
        low, high = (float(end) for end in torch.aminmax(values))
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._cover(low, high)
        if self._width == 0.0:  # every element so far is the same number
            self._counts[0] += values.numel()
            return
        for part in torch.split(values, _EXACT):
            self._counts += self._count(part).double().cpu()

    def _count(self, values: torch.Tensor) -> torch.Tensor:
        """Return how many of at most 2**24 values lie in each bin."""
        end = self._origin + self._width * self._bins
        counts = torch.histc(values, self._bins, self._origin, end)
        if int(counts.sum(dtype=torch.float64)) == values.numel():
            return counts
        # Rounding has moved an end of the bins past an extreme value, which histc leaves out.
        index = ((values - self._origin) / self._width).long().clamp_(0, self._bins - 1)
        return torch.bincount(index, minlength=self._bins)

    def _join(self, other: HistogramObserver) -> None:
        """Put every bin of another histogram where its middle lies."""
        if other._width == 0.0:
            self._add(torch.tensor([other._low]))
            self._counts[self._bin(other._low)] += float(other._counts.sum()) - 1
            return
        low, high = min(self._low, other._low), max(self._high, other._high)
        if self._width == 0.0:  # nothing so far, or one number
            seen, at = float(self._counts.sum()), self._low
            self._counts, self._origin, self._width = other._counts, other._origin, other._width
            self._low, self._high = low, high
            if seen:
                self._cover(at, at)
                self._counts[self._bin(at)] += seen
            return
        self._low, self._high = low, high
        self._cover(other._low, other._high)
        used = other._counts.nonzero().reshape(-1)
        middles = other._origin + (used.double() + 0.5) * other._width
        index = ((middles - self._origin) / self._width).long().clamp_(0, self._bins - 1)
        self._counts.index_add_(0, index, other._counts[used])

    def _bin(self, value: float) -> int:
        if self._width == 0.0:
            return 0
        return min(max(int((value - self._origin) / self._width), 0), self._bins - 1)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        total = float(self._counts.sum())
        if self._width == 0.0:
            return torch.tensor([self._low]), torch.tensor([self._high])
        starts, stops = self._candidates(total)
        low = (self._origin + starts * self._width).clamp(min=self._low)
        high = (self._origin + stops * self._width).clamp(max=self._high)
        best = int(torch.argmin(self._error(starts, stops, low, high)))
        return low[best].reshape(1).float(), high[best].reshape(1).float()

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins to hold ``[low, high]``, keeping the counts."""
        if self._width == 0.0:
            first = float(self._counts.sum()) == 0
            start, end = (low, high) if first else (self._low, self._high)
            if end > start:
                seen, old = self._counts[0].item(), self._origin
                self._origin, self._width = start, (end - start) / self._bins
                if not first:
                    self._counts.zero_()
                    at = int((old - start) / self._width)
                    self._counts[min(max(at, 0), self._bins - 1)] = seen
            else:
                self._origin = low
            return
        while low < self._origin:
            # Merge pairs into the right half; the new bins on the left are empty.
            self._merge(right=True)
        while high > self._origin + self._width * self._bins:
            self._merge(right=False)

    def _merge(self, *, right: bool) -> None:
        half = self._bins // 2
        pairs = self._counts.reshape(half, 2).sum(1)
        self._counts = torch.zeros_like(self._counts)
        self._counts[half:] = pairs if right else 0
        if right:
            self._origin -= self._width * self._bins
        else:
            self._counts[:half] = pairs
        self._width *= 2

    def _candidates(self, total: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bin ranges, from all bins on, that drop the lighter tail step by step."""
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), self._counts.cumsum(0)])
        left = mass  # mass below bin edge k
        right = total - mass  # mass above bin edge k
        start, stop = 0, self._bins
        path = [(start, stop)]
        below, above = left.tolist(), right.tolist()
        while stop - start > 2:
            if below[start + 1] <= above[stop - 1]:
                start += 1
            else:
                stop -= 1
            path.append((start, stop))
            if below[start] + above[stop] > 0.05 * total:
                break
        edges = torch.tensor(path, dtype=torch.float64)
        return edges[:, 0], edges[:, 1]

    def _error(
        self, starts: torch.Tensor, stops: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        centers = self._origin + (torch.arange(self._bins, dtype=torch.float64) + 0.5) * self._width
        moments = torch.stack([centers**k * self._counts for k in range(3)]).cumsum(1)
        moments = torch.cat([torch.zeros(3, 1, dtype=torch.float64), moments], 1)
        below = moments[:, starts.long()]
        above = moments[:, -1:] - moments[:, stops.long()]
        clipped = _squared_distance(below, low) + _squared_distance(above, high)
        inside = moments[0, -1] - below[0] - above[0]
        step = (high.clamp(min=0) - low.clamp(max=0)) / _LEVELS
        return clipped + inside * step**2 / 12


def _squared_distance(moments: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``(x - point)**2`` from count, sum and sum of squares of x."""
    count, total, squares = moments
    distance: torch.Tensor = squares - 2 * point * total + point**2 * count
    return distance.clamp(min=0)
