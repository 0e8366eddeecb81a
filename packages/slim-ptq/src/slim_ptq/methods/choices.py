"""Checks that several methods share."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from slim_core.errors import InvalidValueError
from slim_core.scheme import QuantScheme, Variant

E = TypeVar("E", bound=Enum)


def check_enum(name: str, value: object, kind: type[E]) -> E:
    """Require a member of an enum, or its value."""
    try:
        return kind(value)
    except ValueError:
        listed = ", ".join(repr(member.value) for member in kind)
        raise InvalidValueError(f"{name} must be one of {listed}, not {value!r:.80}") from None


def unsupported_grid(scheme: QuantScheme) -> str | None:
    """Return why methods that choose codes on a grid of levels cannot make a scheme."""
    if scheme.variant is Variant.SPARSE:
        return "its outliers need method sparse"
    if scheme.variant is Variant.FLATQUANT:
        return "its inputs are transformed first, by what method flatquant trains"
    return None
