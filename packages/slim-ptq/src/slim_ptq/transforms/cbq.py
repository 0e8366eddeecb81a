"""Outlier pre-processing of CBQ (arXiv:2312.07950): scale down only detected outlier channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import NORMS, Reader
from slim_ptq.transforms.statistics import ChannelStats

LOW, HIGH = 0.2, 0.8  # quantiles of the coarse detection
REACH = 1.5  # how many of their distances above the upper one outliers begin
EXPONENT = 0.7


@dataclass(frozen=True)
class CbqSmooth:
    """Detect outlier channels coarse to fine and scale them down (``m5``).

    The largest values of the channels and the negated smallest ones are looked at separately.
    Neither weights nor quantization have a say.

    Parameters
    ----------
    kinds : frozenset of LinkKind
        Which links are scaled.
    """

    kinds: frozenset[LinkKind] = NORMS
    tokens = 0  # kept in the statistics
    shift = False
    wraps_norms = True

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`."""
        per_input = torch.maximum(outlier_scales(stats.high), outlier_scales(-stats.low))
        return link.to_source(per_input, "max")


def outlier_scales(peaks: torch.Tensor) -> torch.Tensor:
    """Return ``(peak / largest other peak)**0.7`` for outlier channels and one for the others.

    Parameters
    ----------
    peaks : torch.Tensor
        Largest value of each channel, ``[channels]``.  Outliers begin above ``Q80 + 1.5 (Q80 -
        Q20)``; of those, in ascending order, the split into reserved ones and outliers is taken
        that maximizes the squared gap between the two less the variance of the reserved ones.
    """
    none = torch.ones_like(peaks)
    low, high = torch.quantile(peaks.float(), torch.tensor([LOW, HIGH], device=peaks.device))
    order = peaks.sort().values
    coarse = int((order <= high + REACH * (high - low)).sum())
    if coarse == len(order):
        return none
    first = max(range(coarse, len(order)), key=lambda split: _separation(order, coarse, split))
    largest = order[first - 1]
    if not float(largest) > 0:
        return none
    return torch.where(peaks > largest, (peaks / largest).clamp(min=1.0) ** EXPONENT, none)


def _separation(order: torch.Tensor, coarse: int, split: int) -> float:
    """Return squared gap less variance for outliers from ``split`` on."""
    reserved = order[coarse:split]
    variance = float(reserved.var(correction=0)) if len(reserved) else 0.0
    return float(order[split] - order[split - 1]) ** 2 - variance
