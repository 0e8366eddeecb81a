"""Scaling only the outlier channels, with the threshold that loses least when quantized.

After the observation of Outlier Suppression+ (arXiv:2304.09145) that few channels are at fault and
that scaling the others only makes the weights harder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slim_core.validate import check_float
from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import NORMS, Reader
from slim_ptq.transforms.error import LinkError, best_scales
from slim_ptq.transforms.smooth import column_absmax, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats

STEPS = 20


@dataclass(frozen=True)
class ThresholdSmooth:
    """Search which channels to scale (``m2`` of the classic interface).

    For each threshold between the largest channel and the spread of the activation, the channels
    above it are scaled by SmoothQuant's rule; no scaling at all is a candidate too.  The one whose
    quantized products differ least from the float ones wins.

    Parameters
    ----------
    alpha : float
        Share of the activation in SmoothQuant's rule.
    kinds : frozenset of LinkKind
        Which links are scaled.
    tokens : int
        How many tokens the candidates are compared on.
    """

    alpha: float = 0.5
    kinds: frozenset[LinkKind] = NORMS
    tokens: int = 256
    shift = False
    wraps_norms = True

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, low=0.0, high=1.0)

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`."""
        candidates = self._candidates(stats, column_absmax(readers))
        return best_scales(map(link.to_source, candidates), LinkError(link, stats, readers))

    def _candidates(self, stats: ChannelStats, columns: torch.Tensor) -> Iterator[torch.Tensor]:
        absmax = stats.absmax.float()
        none = torch.ones_like(absmax)
        yield none
        low, high = float((stats.tokens - stats.midrange).std()), float(absmax.max())
        if not 0.0 < low < high:
            return
        smooth = smooth_scales(absmax, columns, self.alpha)
        for step in range(STEPS):
            threshold = high * (low / high) ** (step / STEPS)
            yield torch.where(absmax >= threshold, smooth, none)
