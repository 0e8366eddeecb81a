"""What was tried: values of candidates, kept in a file so that an interrupted search goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.files import check_input_file, write_json
from slim_core.logging import get_logger
from slim_core.recipe import Recipe
from slim_ptq.tuning.target import Target

_log = get_logger("ptq")
_MAX_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate: the groups of layers that fall back, and what the model reached."""

    groups: tuple[str, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result of a search.

    Parameters
    ----------
    target : Target
    metric : str
        That layers were ranked by.
    bound : float
        The worst value that meets the target.
    reference : float
        Of the float model.
    value : float
        Of the model that was written.
    groups : tuple of str
        Groups of layers that fell back.
    count : int
        Number of groups that were ranked.
    layers : tuple of str
        Their layers, by names in the checkpoint.
    trials : tuple of Trial
        In the order of evaluation, those of an interrupted search included.
    recipe : Recipe
        Of the model that was written.
    """

    target: Target
    metric: str
    bound: float
    reference: float
    value: float
    groups: tuple[str, ...]
    count: int
    layers: tuple[str, ...]
    trials: tuple[Trial, ...]
    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "target": str(self.target),
            "metric": self.metric,
            "bound": self.bound,
            "float": self.reference,
            "value": self.value,
            "groups": list(self.groups),
            "ranked": self.count,
            "layers": list(self.layers),
            "trials": [{"groups": list(t.groups), "value": t.value} for t in self.trials],
            "recipe": self.recipe.to_dict(),
        }


class TrialCache:
    """Values by candidate, written to a file after each one.

    Parameters
    ----------
    file : Path
    key : str
        Fingerprint of everything that the values depend on.  A file with another one is not used.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._file = file
        self._content: dict[str, Any] = {"key": key, "float": None, "ranking": None, "trials": []}
        if file.exists():
            stored = _read(file)
            if stored.get("key") == key:
                self._content = stored
                _log.info("%s: %d candidates are known", file, len(stored["trials"]))
            else:
                _log.warning("%s belongs to another job and is begun anew", file)

    @property
    def reference(self) -> float | None:
        """Value of the float model, if it is known."""
        value: float | None = self._content["float"]
        return value

    @reference.setter
    def reference(self, value: float) -> None:
        self._content["float"] = value
        self._save()

    @property
    def ranking(self) -> dict[str, list[str]] | None:
        """Layers by group, the most sensitive group first, if it is known."""
        ranking: dict[str, list[str]] | None = self._content["ranking"]
        return ranking

    @ranking.setter
    def ranking(self, ranking: dict[str, list[str]]) -> None:
        self._content["ranking"] = ranking
        self._save()

    def trials(self) -> tuple[Trial, ...]:
        """Return all candidates in the order of evaluation."""
        return tuple(
            Trial(tuple(trial["groups"]), trial["value"]) for trial in self._content["trials"]
        )

    def find(self, groups: Sequence[str]) -> float | None:
        """Return the value of a candidate, None if it was not evaluated."""
        wanted = set(groups)
        return next((t.value for t in self.trials() if set(t.groups) == wanted), None)

    def add(self, groups: Sequence[str], value: float) -> None:
        """Keep the value of a candidate."""
        self._content["trials"].append({"groups": list(groups), "value": value})
        self._save()

    def _save(self) -> None:
        write_json(self._file, self._content)


def _read(file: Path) -> dict[str, Any]:
    """Return the content, empty if it is no cache."""
    text = check_input_file(file, max_bytes=_MAX_BYTES).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    whole = isinstance(content, dict) and isinstance(content.get("trials"), list)
    return content if whole else {}
