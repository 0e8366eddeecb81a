"""Automatic fallback: which layers to leave in floating point because their input is extreme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.groups import group_by
from slim_core.logging import get_logger
from slim_ptq.calibration.samples import Sample, feed
from slim_ptq.observers import InputScore, SpreadObserver

_log = get_logger("ptq")

SAMPLES = 5  # the ranking is stable after few samples


def measure_spread(
    model: nn.Module, linears: Mapping[str, nn.Module], samples: Sequence[Sample]
) -> dict[str, float]:
    """Return magnitude over spread of the input of each layer, on the first samples."""
    return measure_inputs(model, linears, samples[:SAMPLES], SpreadObserver)


def measure_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    make: Callable[[], InputScore],
) -> dict[str, float]:
    """Return a measure of the input of each layer, by name; :func:`make` gives a new one."""
    scores = {name: make() for name in linears}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            scores[name].update(inputs[0])

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        for _ in feed(model, samples, "Ranking layers"):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: score.value() for name, score in scores.items()}


def choose_fallback(
    spread: Mapping[str, float], count: int, skip: frozenset[str] = frozenset()
) -> list[str]:
    """Return the layers with the most extreme input, hardest first.

    Parameters
    ----------
    spread : mapping
        Magnitude over spread of each layer.
    count : int
        How many layers to choose.  Layers that engines run as one matrix are chosen together, so
        a few more can come out.
    skip : frozenset of str
        Layers that are in floating point already and do not count.
    """
    candidates = {name: value for name, value in spread.items() if name not in skip}
    groups = list(group_by(candidates).values())
    groups.sort(key=lambda group: max(candidates[name] for name in group), reverse=True)
    chosen: list[str] = []
    for group in groups:
        if len(chosen) >= count:
            break
        chosen += group
    for name in chosen:
        _log.info("fallback to float: %s (range_param %.3f)", name, candidates[name])
    return chosen
