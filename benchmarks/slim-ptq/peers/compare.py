"""Comparisons of methods over the same calibration seeds and the same windows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Cells = tuple[tuple[float, ...], ...]  # of each seed, the value of every window


@dataclass(frozen=True)
class Entry:
    """A method of a tool on a model and scheme.

    Parameters
    ----------
    losses, divergences : Cells
        What :meth:`measure.Judge.judge` gives for each seed; one seed where it plays no part.
    """

    tool: str
    method: str
    bits: float
    losses: Cells
    divergences: Cells

    @property
    def perplexities(self) -> list[float]:
        """The perplexity of each seed."""
        return [math.exp(statistics.fmean(windows)) for windows in self.losses]

    @property
    def divergence(self) -> float:
        """The mean divergence over seeds and windows."""
        return statistics.fmean(map(statistics.fmean, self.divergences))


def gap(ours: Cells, theirs: Cells) -> tuple[float, float]:
    """Return the mean of ours less theirs, and the standard error of that mean.

    Values are paired by seed and window.  The error is that of drawing both seeds and windows
    anew: the root of the sum of the squares of both.  A method without seeds has the same values
    for all of them; seeds that one of them has not run do not count.
    """
    count = max(len(ours), len(theirs))
    pairs = zip(_repeated(ours, count), _repeated(theirs, count), strict=False)
    gaps = [[a - b for a, b in zip(mine, other, strict=True)] for mine, other in pairs]
    by_seed = [statistics.fmean(row) for row in gaps]
    by_window = [statistics.fmean(column) for column in zip(*gaps, strict=True)]
    return statistics.fmean(by_seed), math.hypot(_error(by_seed), _error(by_window))


def entries(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[Entry]]:
    """Return what was measured by model and scheme."""
    seeds: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        seeds[row["model"], row["scheme"], row["tool"], row["method"]].append(row)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for (model, scheme, tool, method), found in seeds.items():
        losses, divergences = (
            tuple(tuple(row[kind]) for row in found) for kind in ("losses", "divergences")
        )
        groups[model, scheme].append(Entry(tool, method, found[0]["bits"], losses, divergences))
    return dict(groups)


def _repeated(cells: Cells, count: int) -> Cells:
    return cells * count if len(cells) == 1 else cells


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
