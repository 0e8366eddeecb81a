"""The methods by their names in recipes, and what a plan has to know about them."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

from slim_core.errors import InvalidValueError, SlimError
from slim_core.method import MINMAX, MethodSpec
from slim_core.scheme import Granularity, QuantScheme, Variant
from slim_core.validate import did_you_mean
from slim_ptq.methods.base import Needs, WeightMethod
from slim_ptq.methods.clip import Clip
from slim_ptq.methods.flatquant import FlatQuant
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.methods.hqq import HQQ
from slim_ptq.methods.minmax import MinMax
from slim_ptq.methods.signround import SignRound
from slim_ptq.methods.sparse import Sparse
from slim_ptq.methods.ssz import SSZ

_DEFAULTS = {
    Variant.SPARSE: MethodSpec(Sparse.name),
    Variant.FLATQUANT: MethodSpec(FlatQuant.name),
}

METHODS: dict[str, type[Any]] = {
    method.name: method for method in (MinMax, Clip, SSZ, HQQ, GPTQ, SignRound, Sparse, FlatQuant)
}


@functools.cache
def make_method(spec: MethodSpec) -> WeightMethod:
    """Return the method that a recipe names.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        There is no such method or option, or an option has a wrong value.
    """
    kind = METHODS.get(spec.name)
    if kind is None:
        raise InvalidValueError(
            f"method {spec.name!r} is unknown; known are {', '.join(METHODS)}",
            hint=did_you_mean(spec.name, list(METHODS)),
        )
    known = [field.name for field in fields(kind)]
    for option, _ in spec.options:
        if option not in known:
            raise InvalidValueError(
                f"method {spec.name} has no option {option!r}; it has {', '.join(known) or 'none'}",
                hint=did_you_mean(option, known),
            )
    made: WeightMethod = kind(**dict(spec.options))
    return made


def _block_problem(scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
    """Return why blocks cannot be searched: the methods that do take one row at a time."""
    weight = scheme.weight
    if weight is None or weight.granularity is not Granularity.PER_BLOCK:
        return None
    if shape[1] % weight.group_size == 0:
        return None
    return f"blocks of {weight.group_size} cross the ends of rows of {shape[1]}, use minmax"


class PtqMethods:
    """:class:`slim_core.method.MethodRules` of this package."""

    def default(self, scheme: QuantScheme) -> MethodSpec:
        """Return the method of a layer for which the recipe names none."""
        return _DEFAULTS.get(scheme.variant, MINMAX)

    def problem(
        self, method: MethodSpec, scheme: QuantScheme, shape: tuple[int, int]
    ) -> str | None:
        """Return why a method cannot be made, or cannot quantize to a scheme, None if it can."""
        try:
            reason = make_method(method).unsupported(scheme)
        except SlimError as error:
            return str(error)
        if reason is None and method.name != MinMax.name:
            reason = _block_problem(scheme, shape)
        return None if reason is None else f"method {method} cannot quantize to {scheme}: {reason}"

    def needs_data(self, method: MethodSpec) -> bool:
        """Whether a method needs calibration data."""
        return make_method(method).needs is not Needs.NONE
