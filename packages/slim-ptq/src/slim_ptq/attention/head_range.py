"""Ranges of the heads of queries, keys and values over calibration data."""

from __future__ import annotations

import torch

from slim_core.dtypes import INT8
from slim_core.numerics import affine_params
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.emulate import through_int8

SHARE = 0.9999  # of the values of a head that the interval of queries and keys holds
_SCHEME = TensorScheme(INT8, Granularity.PER_CHANNEL)


class HeadRange:
    """Smallest and largest value of each head, running over all calibration data.

    Parameters
    ----------
    shortest : bool
        Take of each sample the shortest interval with 99.99 % of the values of a head, instead of
        its extremes.
    """

    def __init__(self, *, shortest: bool) -> None:
        self._shortest = shortest
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of heads, 0 before any data."""
        return 0 if self._low is None else self._low.shape[0]

    def update(self, states: torch.Tensor) -> None:
        """Take in a batch of samples, shape (batch, heads, tokens, channels)."""
        rows = states.detach().flatten(2).float()
        ends = shortest_interval(rows.flatten(0, 1), SHARE) if self._shortest else _extremes(rows)
        low, high = (end.reshape(rows.shape[:2]).cpu() for end in ends)
        low, high = low.amin(0), high.amax(0)
        if self._low is not None and self._high is not None:
            low, high = torch.minimum(low, self._low), torch.maximum(high, self._high)
        self._low, self._high = low, high

    def merge(self, other: HeadRange) -> None:
        """Take in what another one has seen of the same heads."""
        if other._low is None or other._high is None:
            return
        self._low = other._low if self._low is None else torch.minimum(self._low, other._low)
        self._high = other._high if self._high is None else torch.maximum(self._high, other._high)

    def params(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale ``max(|low|, |high|) / 127`` and offset 0, float32, shape (heads, 1)."""
        assert self._low is not None  # narrowing: callers look at heads first
        assert self._high is not None
        return affine_params(self._low[:, None], self._high[:, None], _SCHEME)


def shortest_interval(values: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends of the shortest interval that holds a share of the values of each row.

    Parameters
    ----------
    values : torch.Tensor, shape (rows, n)
    share : float
        The interval holds ``int(n * share)`` values, at least one.

    Returns
    -------
    low, high : torch.Tensor, shape (rows,)
        Two of the values; of several shortest intervals the lowest.
    """
    ordered = values.sort(dim=1).values
    inside = max(int(values.shape[1] * share), 1)
    starts = ordered[:, : values.shape[1] - inside + 1]
    ends = ordered[:, inside - 1 :]
    best = (ends - starts).argmin(dim=1, keepdim=True)
    return starts.gather(1, best)[:, 0], ends.gather(1, best)[:, 0]


def round_heads(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return states, shape (batch, heads, tokens, channels), rounded to int8 codes and back.

    Parameters
    ----------
    scale : torch.Tensor, float32, shape (heads, 1)
    """
    return through_int8(states, scale[..., None])


def _extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.aminmax(values, dim=-1)
    return low, high
