"""Checks that several methods share."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

import torch

from slim_core.errors import InvalidValueError
from slim_core.numerics import check_finite
from slim_core.scheme import QuantScheme, Variant
from slim_ptq.methods.base import LayerInputs

E = TypeVar("E", bound=Enum)


def check_enum(name: str, value: object, kind: type[E]) -> E:
    """Require a member of an enum, or its value."""
    try:
        return kind(value)
    except ValueError:
        listed = ", ".join(repr(member.value) for member in kind)
        raise InvalidValueError(f"{name} must be one of {listed}, not {value!r:.80}") from None


def finite_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight in float32; raises a NumericalError if it is not finite."""
    values = weight.detach().float()
    check_finite(name, "weight", values)
    return values


def required_hessian(method: str, name: str, inputs: LayerInputs | None) -> torch.Tensor:
    """Return the Hessian of a layer, without which a method cannot quantize it."""
    if inputs is None or inputs.hessian is None:
        raise InvalidValueError(f"method {method} needs the inputs of {name}")
    return inputs.hessian


def unsupported_grid(scheme: QuantScheme) -> str | None:
    """Return why methods that choose codes on a grid of levels cannot make a scheme."""
    if scheme.variant is Variant.SPARSE:
        return "its outliers need method sparse"
    if scheme.variant is Variant.FLATQUANT:
        return "its inputs are transformed first, by what method flatquant trains"
    return None
