"""Observers of activations."""

from slim_ptq.observers.base import Observer
from slim_ptq.observers.choice import make_observer
from slim_ptq.observers.histogram import HistogramObserver
from slim_ptq.observers.minmax import MeanMinMaxObserver, MinMaxObserver
from slim_ptq.observers.score import InputScore, KurtosisScore, QuantileScore
from slim_ptq.observers.spread import SpreadObserver

__all__ = [
    "HistogramObserver",
    "InputScore",
    "KurtosisScore",
    "MeanMinMaxObserver",
    "MinMaxObserver",
    "Observer",
    "QuantileScore",
    "SpreadObserver",
    "make_observer",
]
