"""What each layer of a model in memory becomes, in the terms of the classic interface."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slim_core.errors import InvalidValueError, PlanError
from slim_core.formats import FORMATS
from slim_core.groups import is_expert
from slim_core.logging import get_logger
from slim_core.matching import match_all
from slim_core.plan import dynamic_variant
from slim_core.scheme import FLOAT, QuantScheme
from slim_core.validate import check_type
from slim_ptq.calibration.samples import Sample
from slim_ptq.config import QuantConfig
from slim_ptq.fallback import choose_fallback, measure_spread
from slim_ptq.mixed import resolve_mix, with_model_default
from slim_ptq.structure import find_routers, weight_of

_log = get_logger("ptq")


def parse_level(disable_level: Any) -> int:
    """Return the number in ``L<number>``.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Not a str, or not ``L`` and an integer without leading zeros.
    """
    text = check_type("disable_level", disable_level, str)
    if not re.fullmatch(r"L(0|[1-9]\d*)", text):
        raise InvalidValueError(f"disable_level must be 'L' and a number, as in 'L5', not {text!r}")
    return int(text[1:])


def resolve_schemes(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    config: QuantConfig,
    *,
    samples: Sequence[Sample],
    level: int,
    mix: dict[str, str],
) -> dict[str, QuantScheme]:
    """Return the scheme of every linear layer.

    Parameters
    ----------
    model : torch.nn.Module
    linears : mapping
        Its linear layers by name.
    config : QuantConfig
    samples : sequence of list or dict
        On which the layers with the most extreme inputs are found; without any, none are.
    level : int
        How many of these stay in floating point.
    mix : dict
        A checked ``mix_cfg``.

    Raises
    ------
    PatternError
        A name or pattern matches nothing.
    PlanError
        The formats cannot hold a layer: group sizes do not divide.
    """
    names = list(linears)
    floats = disabled_names(model, linears, config)
    if config.disable_last_linear:
        floats.add(names[-1])
    if level and samples:
        spread = measure_spread(model, linears, samples)
        floats.update(choose_fallback(spread, level, frozenset(floats)))
    elif level:
        _log.info("disable_level is taken as L0, since there is no calibration data")
    kind = getattr(getattr(model, "config", None), "model_type", "")
    mix = with_model_default(mix, config, kind)
    mixed = resolve_mix(mix, config, names + _other_names(model))
    own = config.scheme()
    # Engines run experts per token.
    default = {name: dynamic_variant(own) if is_expert(name) else own for name in names}
    schemes = {
        name: FLOAT if name in floats else mixed.get(name) or default[name] for name in names
    }
    _check_shapes(linears, schemes)
    return schemes


def disabled_names(
    model: nn.Module, linears: Mapping[str, nn.Module], config: QuantConfig
) -> set[str]:
    """Return the linear layers and other modules that ``disable_names`` matches."""
    names = [*linears, *_other_names(model)]
    disabled = match_all("disable_names", config.disable_names, names)
    return {name for hits in disabled.values() for name in hits}


def _check_shapes(linears: Mapping[str, nn.Module], schemes: Mapping[str, QuantScheme]) -> None:
    """Require that every layer can be held by the formats."""
    problems = []
    for name, scheme in schemes.items():
        rows, columns = weight_of(linears[name]).shape
        reason = FORMATS["safe_tensor"].unsupported(scheme, (rows, columns))
        if reason is not None:
            problems.append(f"{name} cannot be {scheme}: {reason}")
    if problems:
        raise PlanError(problems, hint="name these layers in disable_names")


def _other_names(model: nn.Module) -> list[str]:
    """Return further names that users disable: attentions, convolutions, routers.

    These modules stay as they are in any case.
    """
    routers = find_routers(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or "Attention" in type(module).__name__ or name in routers
    ]
