"""Which attention modules to leave in floating point because rounding hurts them most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from slim_core.logging import get_logger

_log = get_logger("ptq")


class Ranked(Protocol):
    """Something whose rounding was measured."""

    @property
    def difficulty(self) -> float:
        """Largest relative squared error of q, k or v."""


def hardest(quantizers: Mapping[str, Ranked], count: int) -> set[str]:
    """Return the names of the modules with the largest relative error of q, k or v.

    Parameters
    ----------
    count : int
        How many; more than there are is all of them, with a warning.
    """
    if count > len(quantizers):
        _log.warning("of %d attention modules %d were to stay float", len(quantizers), count)
    order = sorted(quantizers, key=lambda name: quantizers[name].difficulty, reverse=True)
    for name in order[:count]:
        _log.info("attention stays float: %s (error %.2e)", name, quantizers[name].difficulty)
    return set(order[:count])
