"""Decompose layer by layer, each making up for the errors of those before it.

For each group of layers that read one tensor, the dense model gives the wanted outputs ``y`` and
the model decomposed so far the inputs ``x'``; the layer becomes the reduced-rank ridge regression
of ``y`` on ``x'``.  Inside a chain of decoder blocks only one block runs at a time, so the work is
a few passes over the model and the memory that of the activations of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import CalibrationError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_lowrank.blocks import Call, Chain, calls_of, find_chain
from slim_lowrank.build import Flags
from slim_lowrank.calibrate import evaluating, token_mask
from slim_lowrank.layers import Layer, find_layers
from slim_lowrank.paired import Pair
from slim_lowrank.solve import Statistics, solve_with_data
from slim_lowrank.surgery import Solver, apply_table
from slim_lowrank.table import LayerRanks
from slim_lowrank.watch import feature_width

logger = get_logger("lowrank")

Errors = dict[str, "float | None"]


def decompose_in_order(
    dense: nn.Module,
    model: nn.Module,
    table: Mapping[str, LayerRanks],
    batches: Sequence[Any],
    statistics: Mapping[str, Statistics],
    solve: Solver,
    errors: Errors,
) -> nn.Module:
    """Decompose the layers of ``model`` in the order in which they run.

    Parameters
    ----------
    dense : Module
        The model as it was; stays so.
    model : Module
        A copy of it; changed in place.
    table : dict of LayerRanks
        What to decompose.
    batches : sequence
        Calibration batches.
    statistics : dict of Statistics
        Of the calibration; gives the gradients.
    solve : callable
        Solves layers that cannot compensate: tables, tied groups, and layers whose outputs, not
        inputs, are watched.
    errors : dict
        Filled with the predicted error of every layer.
    """
    if not batches:
        raise CalibrationError("sequential=True needs calibrate(...) first")
    layers = find_layers(dense)
    alone = {name for name in table if layers[name].tied or feature_width(layers[name]) is None}
    model = apply_table(model, {name: table[name] for name in table if name in alone}, solve)
    names = [name for name in table if name not in alone]
    masks = [token_mask(batch) for batch in batches]
    flags = {name: Flags.of(layers[name].module) for name in names}

    def fit(
        pair: tuple[nn.Module, nn.Module], calls: Sequence[Sequence[Call]], group: list[str]
    ) -> None:
        nonlocal model
        found = _paired(pair, calls, masks, group, layers, find_layers(model))

        def solve_compensated(layer: Layer, ranks: LayerRanks) -> Any:
            seen = found.get(layer.name)
            if seen is None:
                return solve(layer, ranks)
            known = statistics[layer.name]
            seen = replace(seen, gamma=known.gamma, shrinkage=known.shrinkage)
            factors = solve_with_data(layer, ranks, seen)
            errors[layer.name] = factors.error
            return factors

        model = apply_table(model, {name: table[name] for name in group}, solve_compensated)

    with evaluating(dense), evaluating(model), torch.no_grad():
        whole = calls_of(batches)
        groups = _execution_groups(dense, names, whole[0], layers)
        chain = find_chain(dense, names, whole[0])
        inside = [] if chain is None else [g for g in groups if chain.block_of(g[0]) is not None]
        first = groups.index(inside[0]) if inside else len(groups)
        for group in track(groups[:first], "decomposing"):
            fit((dense, model), (whole, whole), group)
        if chain is not None and inside:
            _fit_chain(chain, dense, lambda: model, whole, inside, fit)
        for group in [g for g in groups[first:] if g not in inside]:
            fit((dense, model), (whole, whole), group)
    for name in names:  # built in eval mode
        flags[name].put_on(model.get_submodule(name))
    return model


def _fit_chain(
    chain: Chain,
    dense: nn.Module,
    model: Callable[[], nn.Module],
    whole: Sequence[Call],
    groups: Sequence[list[str]],
    fit: Callable[..., None],
) -> None:
    """Walk both models block by block, carrying their activations along."""
    dense_calls, small_calls = chain.capture(dense, whole), chain.capture(model(), whole)
    for index, name in enumerate(track(chain.names, "decomposing blocks")):
        calls = [each[index] for each in dense_calls], [each[index] for each in small_calls]
        for group in groups:
            if chain.block_of(group[0]) == index:
                fit((dense.get_submodule(name), model().get_submodule(name)), calls, group)
        chain.advance(dense, dense_calls, index)
        chain.advance(model(), small_calls, index)


def _execution_groups(
    dense: nn.Module, names: Sequence[str], call: Call, layers: Mapping[str, Layer]
) -> list[list[str]]:
    """Return the layers in the order of their first call, those that read one tensor together."""
    order: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            order.append((name, args[0]))

        return hook

    handles = [layers[name].module.register_forward_pre_hook(note(name)) for name in names]
    try:
        call.run(dense)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    seen: set[str] = set()
    previous: Tensor | None = None
    for name, x in order:
        if name in seen:
            continue
        seen.add(name)
        if x is previous:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = x
    return groups


def _paired(
    pair: tuple[nn.Module, nn.Module],
    calls: Sequence[Sequence[Call]],
    masks: Sequence[Tensor | None],
    group: Sequence[str],
    dense_layers: Mapping[str, Layer],
    small_layers: Mapping[str, Layer],
) -> dict[str, Statistics]:
    """Collect wanted outputs of the dense module against inputs of the small one."""
    found = {name: Pair(dense_layers[name], small_layers[name]) for name in group}
    for index, mask in enumerate(masks):
        for side, module in enumerate(pair):
            handles = [each.hook(side, mask) for each in found.values()]
            try:
                calls[side][index].run(module)
            finally:
                for handle in handles:
                    handle.remove()
        for each in found.values():
            each.add()
    for name, each in found.items():
        if not each.matched:
            logger.warning("layer %r sees other positions now: its errors are not made up", name)
    return {name: each.statistics() for name, each in found.items() if each.matched}
