"""SmoothQuant with the migration strength of each link searched, after a shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import NORMS, Reader
from slim_ptq.transforms.error import LinkError
from slim_ptq.transforms.smooth import column_absmax, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats

INTERVALS = 10


@dataclass(frozen=True)
class AlphaSearch:
    """Search the share of the activation on two grids (``do_smooth`` of the classic interface).

    First 0, 0.1 ... 1, then ten intervals on either side of the best of them.  No scaling at all
    is a candidate too.

    Parameters
    ----------
    kinds : frozenset of LinkKind
        Which links are scaled.
    shift : bool
        Shift norms as well.
    tokens : int
        How many tokens the candidates are compared on.
    """

    kinds: frozenset[LinkKind] = NORMS
    shift: bool = True
    tokens: int = 256
    wraps_norms = True

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`."""
        columns, error = column_absmax(readers), LinkError(link, stats, readers)

        def at(alpha: float) -> torch.Tensor:
            return link.to_source(smooth_scales(stats.absmax, columns, alpha))

        step = 1 / INTERVALS
        coarse = min((n * step for n in range(INTERVALS + 1)), key=lambda a: error(at(a)))
        fine = (coarse + n * step / INTERVALS for n in range(-INTERVALS, INTERVALS + 1))
        alpha = min((min(max(a, 0.0), 1.0) for a in fine), key=lambda a: error(at(a)))
        found, none = at(alpha), torch.ones(link.width, device=columns.device)
        return found if error(found) < error(none) else none
