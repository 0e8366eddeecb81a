"""Outlier suppression of one block: choose the scales of its links and move them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from slim_core.numerics import check_finite
from slim_ptq.structure import Link, LinkKind, find_linears, weight_of
from slim_ptq.transforms.apply import scale_link
from slim_ptq.transforms.collect import LinkStatistics
from slim_ptq.transforms.statistics import ChannelStats

_MARK = "_slim_smoothed"


class ScaleMethod(Protocol):
    """A way to choose the scales of a link; one dataclass each."""

    @property
    def tokens(self) -> int:
        """How many tokens of the activation it wants to see."""

    def scales(
        self, link: Link, stats: ChannelStats, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return ``[link.width]`` from the readers' input and their weights ``[out, in]``."""


@dataclass(frozen=True, eq=False)
class SuppressedLink:
    """A link that was scaled.

    Parameters
    ----------
    kind : LinkKind
        What it is.
    source : str
        Local name of the norm or layer whose channels were divided.
    targets : tuple of str
        Local names of the modules whose columns were multiplied.
    scales : torch.Tensor
        ``[width]``, as they took effect.
    """

    kind: LinkKind
    source: str
    targets: tuple[str, ...]
    scales: torch.Tensor


def suppress_block(
    block: nn.Module,
    links: Sequence[Link],
    statistics: LinkStatistics,
    method: ScaleMethod,
    *,
    prefix: str = "",
    float_layers: Collection[str] = (),
) -> tuple[SuppressedLink, ...]:
    """Scale the links of a block in place.

    Parameters
    ----------
    block : nn.Module
        Block in floating point.
    links : sequence of Link
        Links to scale, proved on this block.
    statistics : LinkStatistics
        Of these links; afterwards it holds those of the smoothed activations.
    method : ScaleMethod
        Chooses the scales.
    prefix : str
        Name of the block, for messages.
    float_layers : collection of str
        Local names of layers that stay in floating point and so have no say in the choice.

    Returns
    -------
    tuple of SuppressedLink
        What was done; links without a quantized reader or without data are left out.

    Raises
    ------
    NumericalError
        A weight has NaN or infinity, or becomes infinite; names the layer.
    """
    linears = find_linears(block)
    done = []
    for link in links:
        readers = [n for n in link.target_names if n in linears and n not in float_layers]
        stats = statistics.of[link.source]
        if not readers or not stats.count:
            continue
        weights = [weight_of(linears[name]) for name in readers]
        for name, weight in zip(readers, weights, strict=True):
            check_finite(f"{prefix}.{name}".lstrip("."), "weight", weight)
        scales = method.scales(link, stats, weights)
        if len(readers) < len(link.targets) and _is_half(block, link):
            scales = scales.log2().round().exp2()  # exact, so that routers choose as before
        effective = scale_link(block, link, scales)
        index = link.targets[0].index.to(effective.device)
        statistics.of[link.source] = stats.divided(effective[index])
        if link.kind is LinkKind.NORM_LINEAR:
            setattr(block.get_submodule(link.source), _MARK, True)
        done.append(SuppressedLink(link.kind, link.source, link.target_names, effective))
    return tuple(done)


def _is_half(block: nn.Module, link: Link) -> bool:
    dtypes = {block.get_submodule(n).get_parameter("weight").dtype for n in link.target_names}
    return bool(dtypes & {torch.float16, torch.bfloat16})


def smoothed_norms(model: nn.Module) -> frozenset[str]:
    """Return the names of the norms whose weight carries the scales of outlier suppression."""
    return frozenset(name for name, module in model.named_modules() if hasattr(module, _MARK))
