"""Which method turns the weight of a layer into codes, as a recipe names it.

A method is written as its name, or as a mapping of its name and its options::

    method: gptq
    method: {name: gptq, damp: 0.05}

What names and options there are is the business of the package that has the methods; it hands
them to a plan as :class:`MethodRules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from slim_core.errors import InvalidValueError
from slim_core.scheme import QuantScheme
from slim_core.validate import check_type


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method by name, with the options that differ from its defaults."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, value: Any) -> MethodSpec:
        """Read a method from a name, or from a mapping with the key ``name``.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            The value is neither, or the mapping has no name.
        """
        if isinstance(value, MethodSpec):
            return value
        if not isinstance(value, Mapping):
            return cls(check_type("method", value, str))
        if "name" not in value:
            raise InvalidValueError("method must have a name, as in {name: gptq, damp: 0.05}")
        options = {check_type("key of method", key, str): item for key, item in value.items()}
        name = check_type("name of method", options.pop("name"), str)
        return cls(name, tuple(sorted((key, _frozen(item)) for key, item in options.items())))

    def to_plain(self) -> str | dict[str, Any]:
        """Return what :meth:`parse` reads."""
        if not self.options:
            return self.name
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options}
        return {"name": self.name, **options}

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options)})"


MINMAX = MethodSpec("minmax")


class MethodRules(Protocol):
    """What a plan has to know about the methods of a package."""

    def default(self, scheme: QuantScheme) -> MethodSpec:
        """Return the method of a layer for which the recipe names none."""

    def problem(
        self, method: MethodSpec, scheme: QuantScheme, shape: tuple[int, int]
    ) -> str | None:
        """Return why a method cannot quantize a weight (out, in) to a scheme, None if it can."""

    def needs_data(self, method: MethodSpec) -> bool:
        """Whether a method needs calibration data; it must have no problem."""


class OnlyMinMax:
    """The rules where rounding to nearest is all there is."""

    def default(self, scheme: QuantScheme) -> MethodSpec:
        """Return ``minmax``."""
        return MINMAX

    def problem(
        self, method: MethodSpec, scheme: QuantScheme, shape: tuple[int, int]
    ) -> str | None:
        """Accept ``minmax`` without options."""
        return None if method == MINMAX else f"method {method} is unknown; known is minmax"

    def needs_data(self, method: MethodSpec) -> bool:
        """Return False."""
        return False


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
