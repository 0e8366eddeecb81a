"""Outlier suppression of one block: choose the scales of its links and move them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slim_core.numerics import check_finite
from slim_core.scheme import QuantScheme
from slim_ptq.structure import Link, LinkKind, find_linears, weight_of
from slim_ptq.transforms.apply import scale_link, why_not_shifted
from slim_ptq.transforms.awq import BlockAwq
from slim_ptq.transforms.base import Reader, ScaleMethod
from slim_ptq.transforms.block_error import BlockData, BlockError
from slim_ptq.transforms.choose import SkippedLink, skip
from slim_ptq.transforms.collect import LinkStatistics
from slim_ptq.transforms.error import best_scales

_MARK = "_slim_smoothed"


@dataclass(frozen=True, eq=False)
class SuppressedLink:
    """A link that was scaled.

    Parameters
    ----------
    kind : LinkKind
        What it is.
    source : str
        Name of the norm or layer whose channels were divided.
    targets : tuple of str
        Names of the modules whose columns were multiplied.
    scales : torch.Tensor
        ``[width]``, as they took effect.
    shifted : bool
        Whether the middle of each channel was taken off as well.
    unshifted : str
        Why it was not, if the method asked for it and the source is a norm.
    """

    kind: LinkKind
    source: str
    targets: tuple[str, ...]
    scales: torch.Tensor
    shifted: bool = False
    unshifted: str = ""

    def under(self, prefix: str) -> SuppressedLink:
        """Return the same with the name of the block before each name."""
        targets = tuple(f"{prefix}.{name}" for name in self.targets)
        return replace(self, source=f"{prefix}.{self.source}", targets=targets)


def suppress_block(
    block: nn.Module,
    links: Sequence[Link],
    statistics: LinkStatistics,
    method: ScaleMethod,
    schemes: Mapping[str, QuantScheme],
    *,
    prefix: str = "",
    can_add: bool = True,
    stored: Mapping[str, torch.dtype] | None = None,
    data: BlockData | None = None,
) -> tuple[tuple[SuppressedLink, ...], tuple[SkippedLink, ...]]:
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
    schemes : mapping
        How layers will be quantized, by their local names.  Others stay in floating point and so
        have no say in the choice.
    prefix : str
        Name of the block, for messages.
    can_add : bool
        Whether norms and layers may get a bias that they do not have.
    stored : mapping, optional
        Dtypes in which norms will be stored, by their local names, where these are not their own.
    data : BlockData, optional
        There for :class:`~slim_ptq.transforms.awq.BlockAwq`.

    Returns
    -------
    tuple of SuppressedLink, tuple of SkippedLink
        What was done, and what was not since no reader is quantized or no data came by.

    Raises
    ------
    NumericalError
        A weight has NaN or infinity, or becomes infinite; names the layer.
    """
    linears = find_linears(block)
    done, skipped = [], []
    for link in links:
        names = [n for n in link.target_names if n in linears and not _floats(n, schemes)]
        stats = statistics.of[link.source]
        if not names:
            skipped.append(skip(link, "all its readers stay in floating point"))
            continue
        if not stats.count:
            skipped.append(skip(link, "no calibration token reached it"))
            continue
        readers = [Reader(weight_of(linears[name]), schemes[name]) for name in names]
        for name, reader in zip(names, readers, strict=True):
            check_finite(f"{prefix}.{name}".lstrip("."), "weight", reader.weight)
        wanted = method.shift and link.kind is LinkKind.NORM_LINEAR
        unshifted = _why_not_shifted(block, link, schemes, can_add) if wanted else ""
        shift = stats.midrange if wanted and not unshifted else None
        if shift is not None:
            stats = stats.moved(torch.ones_like(shift), shift)
        if isinstance(method, BlockAwq):
            assert data is not None  # narrowing: recipes name it, whose pipeline keeps the data
            of = dict(zip(names, readers, strict=True))
            error = BlockError(block, link, stats, of, data, method.block_tokens)
            scales = best_scales(method.candidates(link, stats), error)
        else:
            scales = method.scales(link, stats, readers)
        if len(names) < len(link.targets) and _is_half(block, link):
            scales = scales.log2().round().exp2()  # exact, so that routers choose as before
        kept = None if stored is None else stored.get(link.source)
        effective = scale_link(block, link, scales, shift, stored=kept)
        index = link.targets[0].index.to(effective.device)
        statistics.of[link.source] = stats.moved(effective[index])
        if link.kind is LinkKind.NORM_LINEAR:
            setattr(block.get_submodule(link.source), _MARK, method.wraps_norms)
        found = SuppressedLink(link.kind, link.source, link.target_names, effective)
        done.append(replace(found, shifted=shift is not None, unshifted=unshifted))
    return tuple(done), tuple(skipped)


def smoothed_norms(model: nn.Module) -> frozenset[str]:
    """Return the names of the norms whose weight carries the scales of outlier suppression."""
    return frozenset(name for name, module in model.named_modules() if hasattr(module, _MARK))


def wrapped_norms(model: nn.Module) -> frozenset[str]:
    """Return the names of the smoothed norms that the classic interface writes with a bias."""
    return frozenset(n for n, module in model.named_modules() if getattr(module, _MARK, False))


def _floats(name: str, schemes: Mapping[str, QuantScheme]) -> bool:
    return name not in schemes or schemes[name].is_float


def _why_not_shifted(
    block: nn.Module, link: Link, schemes: Mapping[str, QuantScheme], can_add: bool
) -> str:
    """Say why a norm is scaled and not shifted.

    A reader with static activations folds the compensation into its integer bias.  Engines drop
    other biases that the class of the model does not know.
    """
    reason = why_not_shifted(block, link)
    if reason is not None:
        return reason
    without = [n for n in (link.source, *link.target_names) if _has_no_bias(block, n)]
    if without and not can_add:
        return f"{without[0]} has no bias, and the format has no place for one"
    for name in link.target_names:
        scheme = schemes.get(name)
        if name in without and not (scheme and scheme.is_static):
            kind = "float" if scheme is None else str(scheme)
            return f"{name} has no bias, and {kind} has no integer bias to hold the shift"
    return ""


def _has_no_bias(block: nn.Module, name: str) -> bool:
    return getattr(block.get_submodule(name), "bias", None) is None


def _is_half(block: nn.Module, link: Link) -> bool:
    dtypes = {block.get_submodule(n).get_parameter("weight").dtype for n in link.target_names}
    return bool(dtypes & {torch.float16, torch.bfloat16})
