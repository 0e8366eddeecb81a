"""What a transform needs to know of an activation: extremes and means of channels, and tokens."""

from __future__ import annotations

import torch

from slim_core.errors import CalibrationError


class ChannelStats:
    """Extremes and mean of each channel over any number of batches, and some of the tokens.

    Parameters
    ----------
    tokens : int
        How many tokens to keep at most, evenly spread over all that come in, however they are
        split into batches.
    """

    def __init__(self, tokens: int = 0) -> None:
        self.count = 0  # tokens that came in
        self._keep = tokens
        self._step = 1  # every so-many-th token is kept
        self._kept: list[torch.Tensor] = []
        self._low = self._high = self._sum = torch.zeros(0)

    def update(self, x: torch.Tensor) -> None:
        """Take in a tensor ``[..., channels]``; one without tokens changes nothing."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0]:
            low, high = rows.aminmax(dim=0)
            total = torch.linalg.vector_norm(rows, ord=1, dim=0, dtype=torch.float32)
            self._take(rows)
            self._add(rows.shape[0], _work(low), _work(high), total.double())

    def merge(self, other: ChannelStats) -> None:
        """Take in what another object has seen."""
        if other.count:
            self._step = max(self._step, other._step)
            self._kept = self._kept + other._kept
            self._thin()
            self._add(other.count, other._low, other._high, other._sum)

    @property
    def low(self) -> torch.Tensor:
        """Smallest value of each channel, ``[channels]``, float32 or float64."""
        return self._seen(self._low)

    @property
    def high(self) -> torch.Tensor:
        """Largest value of each channel, ``[channels]``, float32 or float64."""
        return self._seen(self._high)

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude of each channel, ``[channels]``."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Mean magnitude of each channel over all tokens, ``[channels]``, dtype of ``low``."""
        return self._seen(self._sum).div(self.count).to(self._low.dtype)

    @property
    def midrange(self) -> torch.Tensor:
        """Middle between the extremes of each channel, ``[channels]``."""
        return (self.low + self.high) / 2

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens that were kept, ``[tokens, channels]``, float32 or float64."""
        low = self.low
        return torch.stack(self._kept) if self._kept else low.new_zeros(0, len(low))

    def moved(self, scale: torch.Tensor, shift: torch.Tensor | None = None) -> ChannelStats:
        """Return the statistics of ``(x - shift) / scale`` for ``scale > 0``, each ``[channels]``.

        With a shift the mean magnitude is that of the kept tokens.
        """
        zero = torch.zeros_like(scale) if shift is None else shift
        out = ChannelStats(self._keep)
        out._low, out._high = (self.low - zero) / scale, (self.high - zero) / scale
        out._kept = [(row - zero) / scale for row in self._kept]
        out._sum = self._sum / scale
        if shift is not None and out._kept:
            out._sum = torch.stack(out._kept).abs().double().mean(dim=0) * self.count
        out.count, out._step = self.count, self._step
        return out

    def _seen(self, value: torch.Tensor) -> torch.Tensor:
        if not self.count:
            raise CalibrationError("no calibration sample reached the activation")
        return value

    def _add(self, count: int, low: torch.Tensor, high: torch.Tensor, total: torch.Tensor) -> None:
        self._sum = self._sum + total if self.count else total
        self._low = torch.minimum(self._low, low) if self.count else low
        self._high = torch.maximum(self._high, high) if self.count else high
        self.count += count

    def _take(self, rows: torch.Tensor) -> None:
        """Keep every ``step``-th token."""
        if self._keep:
            first = -self.count % self._step
            self._kept.extend(_work(row).clone() for row in rows[first :: self._step])
            self._thin()

    def _thin(self) -> None:
        """Drop every other token until there are few enough."""
        while len(self._kept) > self._keep:
            self._kept = self._kept[::2]
            self._step *= 2


def _work(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()
