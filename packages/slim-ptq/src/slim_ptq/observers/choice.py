"""From the name of an observer in a recipe to the observer."""

from __future__ import annotations

import torch

from slim_core.recipe import ObserverKind
from slim_ptq.observers.base import Observer
from slim_ptq.observers.histogram import HistogramObserver
from slim_ptq.observers.minmax import MeanMinMaxObserver, MinMaxObserver
from slim_ptq.observers.spread import SpreadObserver

_EXTREME = 50.0  # magnitude over spread from which on a histogram clips too much


class AutoObserver(Observer):
    """Histogram search, unless the range is extreme against the spread: then mean extremes."""

    def __init__(self) -> None:
        self._histogram = HistogramObserver()
        self._extremes = MeanMinMaxObserver()
        self._spread = SpreadObserver()

    def _add(self, x: torch.Tensor) -> None:
        self._histogram.update(x)
        self._extremes.update(x)
        self._spread.update(x)

    def _join(self, other: AutoObserver) -> None:
        self._histogram.merge(other._histogram)
        self._extremes.merge(other._extremes)
        self._spread.merge(other._spread)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        extreme = self._spread.value() > _EXTREME
        return self._extremes.bounds() if extreme else self._histogram.bounds()


_OBSERVERS: dict[ObserverKind, type[Observer]] = {
    ObserverKind.MEAN_MINMAX: MeanMinMaxObserver,
    ObserverKind.MINMAX: MinMaxObserver,
    ObserverKind.HISTOGRAM: HistogramObserver,
    ObserverKind.AUTO: AutoObserver,
}


def make_observer(kind: ObserverKind) -> Observer:
    """Return a fresh observer."""
    return _OBSERVERS[kind]()
