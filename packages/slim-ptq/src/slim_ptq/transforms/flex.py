"""Flexible smoothing: separate shares of activation and weight, given or searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_core.validate import check_float
from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import ALL_LINKS, Reader
from slim_ptq.transforms.error import LinkError, best_scales
from slim_ptq.transforms.smooth import column_absmax, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats

STEPS = 20


@dataclass(frozen=True)
class FlexSmooth:
    """Scale by ``A**alpha / W**beta`` on every kind of link (``m6`` of the classic interface).

    Unless both shares are given, they are searched for each link: first ``alpha`` = 0, 0.05 ... 1
    with ``beta = 1 - alpha``, then ``beta`` = 0, 0.05 ... 1 at that ``alpha``; no scaling at all is
    a candidate too.

    Parameters
    ----------
    alpha, beta : float, optional
        Shares of the activation and of the weight, each in [0, 1]; one alone is not used.
    kinds : frozenset of LinkKind
        Which links are scaled.
    tokens : int
        How many tokens the candidates are compared on.
    """

    alpha: float | None = None
    beta: float | None = None
    kinds: frozenset[LinkKind] = ALL_LINKS
    tokens: int = 256
    shift = False
    wraps_norms = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), low=0.0, high=1.0)

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`.

        Query heads that share a value head share the largest of their activations and weights.
        """
        activation = link.to_source(stats.absmax, "max")
        weight = link.to_source(column_absmax(readers), "max")

        def at(alpha: float, beta: float) -> torch.Tensor:
            scales = torch.ones_like(activation)
            used = link.channels.to(scales.device)
            scales[used] = smooth_scales(activation[used], weight[used], alpha, beta)
            return scales

        if self.alpha is not None and self.beta is not None:
            return at(self.alpha, self.beta)
        error = LinkError(link, stats, readers)
        grid = [step / STEPS for step in range(STEPS + 1)]
        alpha = min(grid, key=lambda share: error(at(share, 1 - share)))
        found = [torch.ones_like(activation), at(alpha, 1 - alpha)]
        return best_scales(found + [at(alpha, beta) for beta in grid], error)
