"""Checks of arguments, with one style of message for all packages.

Each function returns the checked value, so that it can be used in an assignment.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from slim_core.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")
N = TypeVar("N", int, float)


def check_type(name: str, value: Any, expected: type[T]) -> T:
    """Require an instance of ``expected``; a bool never passes for an int.

    Raises
    ------
    InvalidTypeError
        ``name`` is not an ``expected``.
    """
    wrong_bool = isinstance(value, bool) and expected is not bool and issubclass(expected, int)
    if wrong_bool or not isinstance(value, expected):
        raise InvalidTypeError(
            f"{name} must be {expected.__name__}, not {type(value).__name__} ({value!r:.80})"
        )
    return value


def check_int(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Require an int within the closed range ``[low, high]``."""
    return _in_range(name, check_type(name, value, int), low, high)


def check_float(
    name: str, value: Any, *, low: float | None = None, high: float | None = None
) -> float:
    """Require a float, or an int standing for one, within the closed range ``[low, high]``."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise InvalidValueError(f"{name} is too large for a float") from None
    number = check_type(name, value, float)
    if number != number:
        raise InvalidValueError(f"{name} must be a number, not NaN")
    return _in_range(name, number, low, high)


def check_choice(name: str, value: Any, choices: Iterable[T]) -> T:
    """Require one of ``choices``; the message offers the nearest one."""
    allowed = tuple(choices)
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return choice
    listed = ", ".join(repr(choice) for choice in allowed)
    raise InvalidValueError(
        f"{name} must be one of {listed}, not {value!r:.80}",
        hint=did_you_mean(value, [c for c in allowed if isinstance(c, str)]),
    )


def check_str_list(name: str, value: Any) -> list[str]:
    """Require a list of str and return a copy of it."""
    items = check_type(name, value, list)
    for index, item in enumerate(items):
        check_type(f"{name}[{index}]", item, str)
    return list(items)


def did_you_mean(value: Any, candidates: Sequence[str]) -> str | None:
    """Return ``did you mean ...?`` for the candidates nearest to ``value``, or None."""
    if not isinstance(value, str):
        return None
    near = difflib.get_close_matches(value, candidates, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(item) for item in near)}?" if near else None


def _in_range(name: str, value: N, low: N | None, high: N | None) -> N:
    if (low is not None and value < low) or (high is not None and value > high):
        if high is None:
            allowed = f"at least {low}"
        elif low is None:
            allowed = f"at most {high}"
        else:
            allowed = f"in [{low}, {high}]"
        raise InvalidValueError(f"{name} must be {allowed}, not {value}")
    return value
