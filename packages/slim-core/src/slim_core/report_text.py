"""Numbers and facts of a report as people read them, for its renderings."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slim_core.report import Report


def format_bytes(count: int) -> str:
    """Return a size with a binary unit.

    >>> format_bytes(2_529_608)
    '2.41 MiB'
    """
    if abs(count) < 1024:
        return f"{count} B"
    value, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


def format_error(error: float | None) -> str:
    """Return a relative error in percent with three digits; ``-`` if it was not measured.

    >>> format_error(0.00734)
    '0.734 %'
    """
    if error is None:
        return "-"
    percent = 100 * error
    if abs(percent) >= 99.95:
        return f"{percent:.0f} %"
    return f"{percent:#.3g} %" if abs(percent) >= 1e-4 else f"{percent:.3g} %"


def format_change(before: float, after: float) -> str:
    """Return the relative change with its sign.

    >>> format_change(24.0, 24.12)
    '+0.50 %'
    """
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return "n/a"
    return f"{100 * (after / before - 1):+.2f} %"


def format_seconds(seconds: float) -> str:
    """Return a duration.

    >>> format_seconds(75)
    '1 min 15 s'
    """
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_ratio(before: int, after: int) -> str:
    """Return how many times smaller ``after`` is.

    >>> format_ratio(300, 200)
    '1.50x smaller'
    """
    if after <= 0 or before <= 0:
        return "n/a"
    if after <= before:
        return f"{before / after:.2f}x smaller"
    return f"{after / before:.2f}x larger"


def describe_layers(report: Report) -> str:
    """Return how many layers there are of each type: ``28 W8A8, 1 FLOAT``."""
    counts = Counter(layer.type for layer in report.layers)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"


def describe_perplexity(report: Report) -> str | None:
    """Return perplexity before and after and on what, None if it was not measured."""
    before, after = report.perplexity_before, report.perplexity_after
    if before is None and after is None:
        return None
    if before is None or after is None:
        text = f"{before:.4g} before" if before is not None else f"{after:.4g} after"
    else:
        text = f"{before:.4g} -> {after:.4g} ({format_change(before, after)})"
    if report.perplexity_text is not None:
        text += f" on {report.perplexity_text}"
    if report.perplexity_tokens is not None:
        text += f", {report.perplexity_tokens:,} tokens"
    return text
