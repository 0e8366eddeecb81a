"""SmoothQuant (arXiv:2211.10438): move the difficulty of activations into weights by a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_core.validate import check_float
from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.base import ALL_LINKS, NORMS, Reader
from slim_ptq.transforms.statistics import ChannelStats

FLOOR = 1e-5  # of weights and of scales


def smooth_scales(
    absmax: torch.Tensor,
    weight_absmax: torch.Tensor,
    alpha: float = 0.5,
    beta: float | None = None,
) -> torch.Tensor:
    """Return ``max(A**alpha / max(W, 1e-5)**beta, 1e-5)`` for each channel.

    Parameters
    ----------
    absmax : torch.Tensor
        ``A``, largest magnitude of the activation, ``[channels]``.
    weight_absmax : torch.Tensor
        ``W``, largest magnitude in the weight columns that read it, ``[channels]``.
    alpha : float
        Share of the activation, in [0, 1].
    beta : float, optional
        Share of the weight, in [0, 1]; ``1 - alpha`` if not given.

    Returns
    -------
    torch.Tensor
        ``[channels]``; one for a channel that was zero throughout, which says nothing about it.
    """
    check_float("alpha", alpha, low=0.0, high=1.0)
    beta = 1 - alpha if beta is None else check_float("beta", beta, low=0.0, high=1.0)
    scales = absmax**alpha / weight_absmax.clamp(min=FLOOR) ** beta
    return torch.where(absmax > 0, scales.clamp(min=FLOOR), torch.ones_like(scales))


@dataclass(frozen=True)
class SmoothQuant:
    """Scale all channels with one migration strength (``m1`` of the classic interface).

    Parameters
    ----------
    alpha : float
        Share of the activation, in [0, 1].
    kinds : frozenset of LinkKind
        Which links are scaled.
    shift : bool
        Shift norms as well, as Outlier Suppression+ (arXiv:2304.09145) does.
    """

    alpha: float = 0.5
    kinds: frozenset[LinkKind] = NORMS
    shift: bool = False
    tokens = 0  # kept in the statistics
    wraps_norms = True

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, low=0.0, high=1.0)

    def scales(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``; see :class:`ScaleMethod`.

        Query heads that share a value head share the mean of their scales.
        """
        return link.to_source(smooth_scales(stats.absmax, column_absmax(readers), self.alpha))


@dataclass(frozen=True)
class IterativeSmooth(SmoothQuant):
    """SmoothQuant with a strong migration on every kind of link (``m4``)."""

    alpha: float = 0.9
    kinds: frozenset[LinkKind] = ALL_LINKS


def column_absmax(readers: Sequence[Reader]) -> torch.Tensor:
    """Return the largest magnitude in each weight column over several readers, ``[in]``."""
    return torch.stack([r.weight.abs().amax(dim=0).float() for r in readers]).amax(dim=0)
