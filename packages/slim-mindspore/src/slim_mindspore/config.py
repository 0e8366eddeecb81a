"""Configuration of sparse quantization."""

from __future__ import annotations

from typing import Any

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.validate import check_float, check_type

FRACTION_MIN, FRACTION_MAX = 0.01, 0.1


class QuantConfig:
    """Options of :class:`slim_mindspore.Calibrator`.

    Parameters
    ----------
    disable_names : list of str, optional
        Exact names of cells to leave in floating point, such as ``model.layers.0.attention.wo``.
    fraction : float
        Share of the largest elements of each weight that use the whole of int8, in
        ``[0.01, 0.1]``; the rest is kept within 4 bits.

    Raises
    ------
    InvalidTypeError
        ``disable_names`` is not a list, or ``fraction`` not a float.
    InvalidValueError
        An element of ``disable_names`` is not a str, or ``fraction`` is out of range.
    """

    def __init__(self, disable_names: list[str] | None = None, fraction: float = 0.01) -> None:
        if not isinstance(fraction, float):
            raise InvalidTypeError(f"fraction must be float, not {type(fraction).__name__}")
        self.disable_names = check_names([] if disable_names is None else disable_names)
        self.fraction = check_float("fraction", fraction, low=FRACTION_MIN, high=FRACTION_MAX)

    def __repr__(self) -> str:
        return f"QuantConfig(disable_names={self.disable_names}, fraction={self.fraction})"


def check_names(names: Any) -> list[str]:
    """Return a copy of the names of cells to leave in floating point, checked."""
    for index, name in enumerate(check_type("disable_names", names, list)):
        if not isinstance(name, str):
            raise InvalidValueError(
                f"disable_names[{index}] must be str, not {type(name).__name__} ({name!r:.80})"
            )
    return list(names)
