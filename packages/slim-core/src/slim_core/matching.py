"""Glob patterns over layer names; a pattern that matches nothing is an error."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from slim_core.errors import PatternError
from slim_core.validate import did_you_mean


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that the case-sensitive glob matches, in their order."""
    test = re.compile(fnmatch.translate(pattern)).match
    return [name for name in names if test(name)]


def match_all(what: str, patterns: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names matched by each pattern.

    Parameters
    ----------
    what : str
        Name of the parameter that holds the patterns, for the message.

    Raises
    ------
    PatternError
        Patterns that match no name, each with the nearest names.
    """
    found = {pattern: match(pattern, names) for pattern in patterns}
    lost = [pattern for pattern, hits in found.items() if not hits]
    if lost:
        raise PatternError(
            f"{what}: no layer is called {' or '.join(repr(pattern) for pattern in lost)}",
            hint=_nearest(lost, names),
        )
    return found


def _nearest(patterns: Sequence[str], names: Sequence[str]) -> str:
    for pattern in patterns:
        plain = pattern.replace("*", "")
        near = did_you_mean(plain, names)
        if near is not None:
            return near
        tail = plain.rsplit(".", 1)[-1]
        inside = [name for name in names if tail and tail in name]
        if inside:
            return f"names that contain {tail!r}: {', '.join(inside[:3])}"
    return f"layer names look like {', '.join(list(names)[:3])}" if names else "there are no layers"
