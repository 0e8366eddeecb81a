"""The search: how many of a ranking are needed, and which of them can be spared."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def smallest_prefix(count: int, meets: Callable[[int], bool]) -> int:
    """Return the smallest ``k`` in [0, count] found by bisection for which ``meets(k)`` holds.

    Parameters
    ----------
    count : int
        ``meets(count)`` must hold; it is not asked.
    meets : callable
        Asked for ``k`` below ``count`` only, for 0 first.

    Returns
    -------
    int
        ``k`` that meets while ``k - 1`` does not.  If more is always better, the smallest of all.
    """
    if count == 0 or meets(0):
        return 0
    fails, holds = 0, count
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if meets(middle):
            holds = middle
        else:
            fails = middle
    return holds


def spare(chosen: Sequence[str], meets: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return what is left when members are dropped one by one, the last first, while it meets."""
    kept = list(chosen)
    for name in reversed(chosen[:-1]):  # without the last one it does not meet: that was asked
        rest = [other for other in kept if other != name]
        if meets(rest):
            kept = rest
    return kept
