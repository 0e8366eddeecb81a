"""SmoothQuant (arXiv:2211.10438): move the difficulty of activations into weights by a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_core.validate import check_float
from slim_ptq.structure import Link
from slim_ptq.transforms.statistics import ChannelStats

FLOOR = 1e-5  # of weights and of scales


def smooth_scales(
    absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float = 0.5
) -> torch.Tensor:
    """Return ``max(A**alpha / max(W, 1e-5)**(1 - alpha), 1e-5)`` for each channel.

    Parameters
    ----------
    absmax : torch.Tensor
        ``A``, largest magnitude of the activation, ``[channels]``.
    weight_absmax : torch.Tensor
        ``W``, largest magnitude in the weight columns that read it, ``[channels]``.
    alpha : float
        Share of the activation, in [0, 1].

    Returns
    -------
    torch.Tensor
        ``[channels]``; one for a channel that was zero throughout, which says nothing about it.
    """
    check_float("alpha", alpha, low=0.0, high=1.0)
    scales = absmax**alpha / weight_absmax.clamp(min=FLOOR) ** (1 - alpha)
    return torch.where(absmax > 0, scales.clamp(min=FLOOR), torch.ones_like(scales))


@dataclass(frozen=True)
class SmoothQuant:
    """Scale all channels with one migration strength (``m1`` of the classic interface).

    Parameters
    ----------
    alpha : float
        Share of the activation, in [0, 1].
    """

    alpha: float = 0.5
    tokens = 0  # kept in the statistics

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, low=0.0, high=1.0)

    def scales(
        self, link: Link, stats: ChannelStats, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``.

        Parameters
        ----------
        stats : ChannelStats
            Of what the readers read.
        weights : sequence of torch.Tensor
            Weights ``[out, in]`` of the readers that will be quantized.
        """
        per_input = smooth_scales(stats.absmax, column_absmax(weights), self.alpha)
        return link.to_source(per_input)


def column_absmax(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude in each column over several weights ``[out, in]``."""
    return torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
