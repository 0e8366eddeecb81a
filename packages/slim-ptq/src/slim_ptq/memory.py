"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Return free pages of the C heap to the system; does nothing where that cannot be asked for.

    After a few large tensors are freed, glibc serves the next ones from its heap, whose free gaps
    it keeps: without this the resident memory creeps up with the number of blocks.
    """
    release = _malloc_trim()
    if release is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library than glibc
        return None
    return found
