"""AWQ (arXiv:2306.00978): give the weights that large activations meet a finer grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import ALL_LINKS, NORMS, Reader
from slim_ptq.transforms.error import LinkError, best_scales
from slim_ptq.transforms.smooth import FLOOR
from slim_ptq.transforms.statistics import ChannelStats

STEPS = 20


@dataclass(frozen=True)
class AwqScale:
    """Search the exponent of the mean activation (``m3`` of the classic interface).

    ``s = mean|x|**r`` over the geometric mean of its extremes, for ``r`` = 0, 1/20 ... 19/20;
    ``r = 0`` is no scaling.  The mean is over all calibration tokens; the quantized products of
    some of them decide.

    Parameters
    ----------
    kinds : frozenset of LinkKind
        Which links are scaled.
    tokens : int
        How many tokens the candidates are compared on.
    """

    kinds: frozenset[LinkKind] = NORMS
    tokens: int = 256
    shift = False
    wraps_norms = True

    def candidates(self, link: Link, stats: ChannelStats) -> Iterator[torch.Tensor]:
        """Yield the scales of a link, ``[link.width]``, for each exponent."""
        mean = link.to_source(stats.mean_magnitude.float())
        for step in range(STEPS):
            yield _centred(mean, step / STEPS, link.channels)

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`."""
        return best_scales(self.candidates(link, stats), LinkError(link, stats, readers))


@dataclass(frozen=True)
class BlockAwq(AwqScale):
    """AWQ on every kind of link, with the output of the whole block to decide.

    What counts is what the error of the readers does to the output of their decoder block: through
    softmax and gates, and of all readers together.

    Parameters
    ----------
    kinds : frozenset of LinkKind
        Which links are scaled.
    block_tokens : int
        How many tokens run through the block for each candidate at least: whole batches of
        calibration data, evenly chosen.
    """

    kinds: frozenset[LinkKind] = ALL_LINKS
    tokens: int = 0  # kept in the statistics
    block_tokens: int = 3072


def _centred(mean: torch.Tensor, exponent: float, channels: torch.Tensor) -> torch.Tensor:
    """Return the scales for an exponent, their extremes around one; one outside ``channels``."""
    scales = torch.ones_like(mean)
    used = channels.to(mean.device)
    powers = mean[used].clamp(min=FLOOR) ** exponent
    scales[used] = (powers / (powers.max() * powers.min()).sqrt()).clamp(min=FLOOR)
    return scales
