"""Put decomposed layers into a model, keeping shared modules shared and tied weights tied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from slim_core.errors import InvalidValueError
from slim_core.logging import get_logger
from slim_core.validate import did_you_mean
from slim_lowrank.build import Factors, build, fill
from slim_lowrank.layers import Layer, find_layers
from slim_lowrank.modules import FactoredEmbedding, FactoredLinear, TiedLinear
from slim_lowrank.table import LayerRanks

logger = get_logger("lowrank")

Solver = Callable[[Layer, LayerRanks], Factors]


def apply_table(
    model: nn.Module, table: Mapping[str, LayerRanks], solve: Solver | None = None
) -> nn.Module:
    """Replace, in place, the layers of a table.

    Parameters
    ----------
    model : Module
        Changed in place.
    table : dict of LayerRanks
        By first name; a tied group must be in it as a whole, with one rank.
    solve : callable, optional
        Gives the factors of a layer.  None changes the structure only: the new weights have the
        framework's default initialisation.

    Returns
    -------
    Module
        The model, or the new module if the model itself is a layer of the table.

    Raises
    ------
    InvalidValueError
        The table does not fit the model; the layer is named and nothing was changed.
    """
    if not table:
        return model
    layers = check_table(model, table)
    done: dict[str, nn.Module] = {}
    for name, ranks in _embeddings_first(table):
        layer = layers[name]
        sibling = next((done[other] for other in layer.tied if other in done), None)
        if sibling is not None:
            new = _tie(layer, sibling)
        else:
            new = build(layer, ranks)
            if solve is not None:
                fill(new, solve(layer, ranks))
        done[name] = new
        model = replace(model, layer.names, new)
    return model


def replace(model: nn.Module, names: tuple[str, ...], new: nn.Module) -> nn.Module:
    """Set a module under all its names; return the model, or ``new`` where that is the root."""
    for name in names:
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def check_table(model: nn.Module, table: Mapping[str, LayerRanks]) -> dict[str, Layer]:
    """Require that every layer of a table is in the model and can be decomposed as it says."""
    layers = find_layers(model)
    for name, ranks in table.items():
        layer = layers.get(name)
        if layer is None:
            raise InvalidValueError(
                f"the rank table names {name!r}, which is no layer of the model",
                hint=did_you_mean(name, list(layers)),
            )
        if layer.skip is not None:
            raise InvalidValueError(f"layer {name!r} cannot be decomposed: {layer.skip}")
        if layer.shape != ranks.shape or layer.kind != ranks.kind:
            raise InvalidValueError(
                f"layer {name!r} is a {layer.kind} of shape {layer.shape}, the rank table has a "
                f"{ranks.kind} of shape {ranks.shape}"
            )
        for other in layer.tied:
            if other not in table or table[other].ranks != ranks.ranks or ranks.form != "factors":
                raise InvalidValueError(
                    f"layers {name!r} and {other!r} share a weight: the rank table must give both "
                    "the form 'factors' with one rank"
                )
    return layers


def drop_broken_ties(layers: Mapping[str, Layer], chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return reasons for the chosen layers whose tied partners were not chosen."""
    return {
        name: f"its weight is shared with {other!r}, which stays dense"
        for name in chosen
        for other in layers[name].tied
        if other not in chosen
    }


def group_params(table: Mapping[str, LayerRanks], layers: Mapping[str, Layer]) -> tuple[int, int]:
    """Return the weights of the layers of a table before and after, tied groups counted once."""
    before = after = 0
    seen: set[str] = set()
    for name, ranks in table.items():
        if name not in seen:
            seen.update((name, *layers[name].tied))
            before += math.prod(ranks.shape)
            after += ranks.params
    return before, after


def _embeddings_first(table: Mapping[str, LayerRanks]) -> list[tuple[str, LayerRanks]]:
    """Order so that a tied head finds the embedding whose factors it takes over."""
    return sorted(table.items(), key=lambda item: item[1].kind != "embedding")


def _tie(layer: Layer, sibling: nn.Module) -> nn.Module:
    """Return a module with the layer's own bias and the factors of its sibling."""
    bias = cast("nn.Parameter | None", getattr(layer.module, "bias", None))
    new: nn.Module
    if isinstance(sibling, FactoredEmbedding):
        new = TiedLinear(sibling, bias)
    else:
        first, last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        first.weight, last.weight = (cast(nn.Parameter, part.weight) for part in sibling.children())
        last.bias = bias  # type: ignore[assignment]
        new = FactoredLinear(first, last)
    return new.train(layer.module.training)
