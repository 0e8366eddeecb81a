"""Settings of the two compressors, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.validate import check_float, check_int


@dataclass(frozen=True)
class RACompressConfig:
    """Settings of the ALiBi window search.

    Parameters
    ----------
    theta : float, default 1e-5
        Tolerance in ``[1e-5, 1e-3]``.  In the deployed formula it enters as ``+ln(theta)``, so a
        larger value gives *larger* windows.
    alpha : int, default 100
        Margin in nats, in ``[0, 10000]``.

    Raises
    ------
    InvalidTypeError
        A value of another type; an int is no float here, and a bool no int.
    InvalidValueError
        A value out of its range, or NaN.
    """

    theta: float = 1e-5
    alpha: int = 100

    def __post_init__(self) -> None:
        _check_range("theta", self.theta, 1e-5, 1e-3)
        check_int("alpha", self.alpha, low=0, high=10000)


@dataclass(frozen=True)
class RARopeCompressConfig:
    """Settings of the retrieval-head search of RoPE models.

    Parameters
    ----------
    induction_head_ratio : float, default 0.14
        Share of all KV heads kept as induction heads, in ``[0, 1]``.
    echo_head_ratio : float, default 0.01
        Share of all KV heads kept as echo heads, in ``[0, 1]``.

    Raises
    ------
    InvalidTypeError
        A ratio that is not a float (``1`` is refused, ``1.0`` is not).
    InvalidValueError
        A ratio out of its range, or NaN.
    """

    induction_head_ratio: float = 0.14
    echo_head_ratio: float = 0.01

    def __post_init__(self) -> None:
        _check_range("induction_head_ratio", self.induction_head_ratio, 0.0, 1.0)
        _check_range("echo_head_ratio", self.echo_head_ratio, 0.0, 1.0)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, float):
        raise InvalidTypeError(f"{name} must be float, not {type(value).__name__} ({value!r:.80})")
    check_float(name, value, low=low, high=high)


def check_ratio(name: str, value: float) -> float:
    """Require a share in ``[0, 1]``."""
    return check_float(name, value, low=0.0, high=1.0)


def check_positive(name: str, value: float) -> float:
    """Require a finite number above zero."""
    number = check_float(name, value)
    if not 0.0 < number < float("inf"):
        raise InvalidValueError(f"{name} must be finite and above 0, not {value}")
    return number
