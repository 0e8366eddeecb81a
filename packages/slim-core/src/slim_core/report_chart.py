"""The bar chart of the HTML pages, drawn as inline SVG."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

OTHER = "other"

_KINDS = 8  # colours of the style sheet, besides the one of OTHER
_WIDTH, _HEIGHT = 1040, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 4, 10, 20
_LABELS = 16  # block numbers on the horizontal axis, at most
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def kinds_of(names: Sequence[str]) -> dict[str, int]:
    """Return the colour of each kind of layer: the last part of its name, the commonest first."""
    counts = Counter(kind(name) for name in names)
    if len(counts) <= _KINDS:
        return {name: index for index, name in enumerate(counts)}
    common = {name for name, _ in counts.most_common(_KINDS)}
    named = {name: index for index, name in enumerate(n for n in counts if n in common)}
    return named | {OTHER: _KINDS}


def kind(name: str) -> str:
    """Return the last part of the name of a layer."""
    return name.rpartition(".")[2]


def legend(kinds: Mapping[str, int]) -> str:
    """Return the legend of the colours as HTML."""
    keys = "".join(
        f"<span class=key><i class=k{index}></i>{escape(kind)}</span>"
        for kind, index in sorted(kinds.items(), key=lambda item: item[1])
    )
    return f"<p class=legend>{keys}</p>"


def percent(value: float) -> str:
    """Return the label of a line of the axis for relative errors."""
    return f"{100 * value:.6g} %"


@dataclass(frozen=True)
class BarChart:
    """Vertical bars, one a layer; a value of None leaves a gap.

    Parameters
    ----------
    title : str
    values : sequence of float or None
    tick : callable
        From a value to its label on the axis.
    """

    title: str
    values: Sequence[float | None]
    tick: Callable[[float], str] = percent

    def render(self, names: Sequence[str], kinds: Mapping[str, int], labels: Sequence[str]) -> str:
        """Return the SVG; ``names`` place the bars, ``kinds`` colour them, ``labels`` explain."""
        top, step = axis(max((v for v in self.values if v and math.isfinite(v)), default=0.0))
        return (
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(self.title)} of each layer">'
            + self._grid(top, step)
            + "".join(self._bars(names, kinds, labels, top))
            + self._blocks(names)
            + "</svg>"
        )

    def _grid(self, top: float, step: float) -> str:
        lines = []
        for index in range(round(top / step) + 1):
            y = _y(index * step, top)
            lines.append(
                f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{escape(self.tick(index * step))}</text>"
            )
        return "".join(lines)

    def _bars(
        self, names: Sequence[str], kinds: Mapping[str, int], labels: Sequence[str], top: float
    ) -> list[str]:
        bars = []
        slot = _slot(len(names))
        width = max(min(0.78 * slot, 26.0), min(slot, 0.6))
        for index, (name, label, value) in enumerate(zip(names, labels, self.values, strict=True)):
            if value is None:
                continue
            x = _LEFT + (index + 0.5) * slot - width / 2
            y = _y(min(value, top) if not math.isnan(value) else top, top)
            bars.append(
                f'<rect class="k{kinds.get(kind(name), _KINDS)}" x="{x:.2f}" y="{y:.2f}" '
                f'width="{width:.2f}" height="{_y(0, top) - y:.2f}">'
                f"<title>{escape(label)}</title></rect>"
            )
        return bars

    def _blocks(self, names: Sequence[str]) -> str:
        """Return the numbers of decoder blocks below their first layers."""
        starts: dict[str, int] = {}
        for index, name in enumerate(names):
            match = _BLOCK.search(name)
            if match:
                starts.setdefault(match.group(1), index)
        every = math.ceil(len(starts) / _LABELS) or 1
        slot = _slot(len(names))
        return "".join(
            f'<text x="{_LEFT + (index + 0.1) * slot:.1f}" y="{_HEIGHT - 5}">'
            f"{'block ' if count == 0 else ''}{block}</text>"
            for count, (block, index) in enumerate(starts.items())
            if count % every == 0
        )


def axis(peak: float) -> tuple[float, float]:
    """Return the end of the axis and the distance of its lines: 3 to 6 steps of 1, 2 or 5.

    >>> axis(0.0093)
    (0.01, 0.002)
    """
    if peak <= 0:
        return 0.01, 0.002
    raw = peak / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return step * math.ceil(peak / step - 1e-9), step


def _slot(count: int) -> float:
    return (_WIDTH - _LEFT - _RIGHT) / max(count, 1)


def _y(value: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)
