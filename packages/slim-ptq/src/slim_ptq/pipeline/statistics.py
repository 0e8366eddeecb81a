"""What is kept of the calibration data for the layers of one block."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slim_core.groups import input_group
from slim_core.numerics import check_finite
from slim_core.plan import LayerPlan
from slim_core.recipe import ObserverKind
from slim_ptq.observers import Observer, make_observer

_KEPT_TOKENS = 256  # for the output error in the report


class InputStatistics:
    """Range and a few tokens of the tensor that enters a group of layers.

    Layers that engines run as one matrix read the same tensor, which is watched once.

    Parameters
    ----------
    name : str
        Of the first layer of the group in the checkpoint, for messages.
    observer : Observer, optional
        None if no layer of the group needs a range.
    """

    def __init__(self, name: str, observer: Observer | None) -> None:
        self._name = name
        self.observer = observer
        self.tokens: torch.Tensor | None = None

    def watch(self, x: torch.Tensor) -> None:
        """Take in a batch, shape (rows, tokens, channels), or (tokens, channels) of an expert."""
        if not x.numel():
            return
        check_finite(self._name, "input", x)
        if self.tokens is None:
            self.tokens = x.detach().reshape(-1, x.shape[-1])[:_KEPT_TOKENS].clone()
        if self.observer is None:
            return
        if x.ndim == 3:
            self.observer.update_rows(x)
        else:
            self.observer.update(x)


def block_statistics(
    layers: Mapping[str, LayerPlan], kind: ObserverKind
) -> dict[str, InputStatistics]:
    """Return the statistics of each layer of a block; grouped layers share one.

    Parameters
    ----------
    layers : mapping
        Quantized layers of the block by their local module names.
    """
    groups: dict[str, InputStatistics] = {}
    shared: dict[str, InputStatistics] = {}
    static = {input_group(p.name) for p in layers.values() if p.scheme.is_static}
    for local, plan in layers.items():
        group = input_group(plan.name)
        if group not in groups:
            observer = make_observer(kind) if group in static else None
            groups[group] = InputStatistics(plan.name, observer)
        shared[local] = groups[group]
    return shared


def first_watchers(statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Return one layer for each of the statistics: the first that shares it."""
    seen: set[int] = set()
    first = {}
    for local, stats in statistics.items():
        if id(stats) not in seen:
            seen.add(id(stats))
            first[local] = stats
    return first
