"""What every way to choose the scales of a link has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from slim_core.scheme import QuantScheme
from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.statistics import ChannelStats

NORMS = frozenset({LinkKind.NORM_LINEAR})
ALL_LINKS = frozenset(LinkKind)


class Reader(NamedTuple):
    """A layer that reads the channels of a link and will be quantized."""

    weight: torch.Tensor  # [out, in]
    scheme: QuantScheme


class ScaleMethod(Protocol):
    """A way to choose the scales of a link; one frozen dataclass each."""

    @property
    def kinds(self) -> frozenset[LinkKind]:
        """Which links it scales."""

    @property
    def tokens(self) -> int:
        """How many tokens of the activation it wants to see."""

    @property
    def shift(self) -> bool:
        """Whether norms are shifted as well, so that their channels lie evenly around zero."""

    @property
    def wraps_norms(self) -> bool:
        """Whether the classic interface writes a bias for each norm that was scaled."""

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the positive scales of a link, ``[link.width]``.

        Parameters
        ----------
        link : Link
        stats : ChannelStats
            Of what the readers read, after the shift if there is one.
        readers : sequence of Reader
            Those that will be quantized, at least one.
        """
