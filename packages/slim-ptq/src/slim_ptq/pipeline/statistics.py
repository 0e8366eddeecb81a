"""What is kept of the calibration data for the layers of one block."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import torch

from slim_core.groups import input_group
from slim_core.numerics import check_finite
from slim_core.plan import LayerPlan
from slim_core.recipe import ObserverKind
from slim_ptq.calibration.moments import Moments
from slim_ptq.methods import LayerInputs, Needs, make_method
from slim_ptq.observers import Observer, make_observer
from slim_ptq.parallel import Team

_KEPT_TOKENS = 256  # for the output error in the report


class InputStatistics:
    """Range, moments and a few tokens of the tensor that enters a group of layers.

    Layers that engines run as one matrix read the same tensor, which is watched once.

    Parameters
    ----------
    name : str
        Of the first layer of the group in the checkpoint, for messages.
    observer : Observer, optional
        None if no layer of the group needs a range.
    needs : Needs
        What the methods of the group need.
    """

    def __init__(self, name: str, observer: Observer | None, needs: Needs = Needs.NONE) -> None:
        self._name = name
        self._moments: Moments | None = Moments(needs)
        self.observer = observer
        self.tokens: torch.Tensor | None = None

    def watch(self, x: torch.Tensor) -> None:
        """Take in a batch, shape (rows, tokens, channels), or (tokens, channels) of an expert."""
        if not x.numel():
            return
        check_finite(self._name, "input", x)
        if self.tokens is None:
            self.tokens = x.detach().reshape(-1, x.shape[-1])[:_KEPT_TOKENS].clone()
        assert self._moments is not None
        self._moments.add(x)
        if self.observer is None:
            return
        if x.ndim == 3:
            self.observer.update_rows(x)
        else:
            self.observer.update(x)

    def combine(self, team: Team) -> None:
        """Become, in every process, the statistics of the data of all of them."""
        if team.size == 1:
            return
        assert self._moments is not None
        self._moments.combine(team)
        self.tokens = next((seen for seen in team.gather(self.tokens) if seen is not None), None)
        if self.observer is not None:
            self.observer = team.merged(self.observer)

    def inputs(self) -> LayerInputs:
        """Return what methods see of all batches, the same object each time."""
        assert self._moments is not None
        return self._moments.inputs()

    def forget_inputs(self) -> None:
        """Free the moments and what methods computed of them, which no layer needs any more."""
        self._moments = None


def block_statistics(
    layers: Mapping[str, LayerPlan], kind: ObserverKind
) -> dict[str, InputStatistics]:
    """Return the statistics of each layer of a block; grouped layers share one.

    Parameters
    ----------
    layers : mapping
        Quantized layers of the block by their local module names.
    """
    groups: dict[str, list[str]] = {}
    for local, plan in layers.items():
        groups.setdefault(input_group(plan.name), []).append(local)
    shared: dict[str, InputStatistics] = {}
    for members in groups.values():
        plans = [layers[local] for local in members]
        observer = make_observer(kind) if any(plan.scheme.is_static for plan in plans) else None
        needs = functools.reduce(operator.or_, (make_method(plan.method).needs for plan in plans))
        statistics = InputStatistics(plans[0].name, observer, needs)
        shared |= dict.fromkeys(members, statistics)
    return {local: shared[local] for local in layers}


def first_watchers(statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Return one layer for each of the statistics: the first that shares it."""
    seen: set[int] = set()
    first = {}
    for local, stats in statistics.items():
        if id(stats) not in seen:
            seen.add(id(stats))
            first[local] = stats
    return first
