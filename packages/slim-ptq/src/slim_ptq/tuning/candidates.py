"""Candidates of a search: recipes that leave some layers accurate, made and measured for real."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slim_core.files import make_dir
from slim_core.recipe import Recipe, Rule
from slim_core.report import Report
from slim_core.scheme import QuantScheme
from slim_ptq.__about__ import __version__
from slim_ptq.api import quantize
from slim_ptq.calibration.text import TokenWindows, load_tokenizer
from slim_ptq.load import load_model
from slim_ptq.precision import TaskData
from slim_ptq.prepare import Prepared
from slim_ptq.tasks import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Everything that candidates have in common.

    Parameters
    ----------
    job : Prepared
    data : TokenWindows
    tasks : TaskData
        What is measured.
    source : Path
        The file or directory of ``tasks``.
    fallback : QuantScheme
        Of the layers that fall back.
    scratch : Path
        Directory for the candidates, which are removed once they are measured.
    """

    job: Prepared
    data: TokenWindows
    tasks: TaskData
    source: Path
    fallback: QuantScheme
    scratch: Path
    device: str
    batch: int
    trust_remote_code: bool

    def recipe(self, layers: Sequence[str]) -> Recipe:
        """Return the recipe with these layers falling back."""
        given = dict(self.job.recipe)
        if self.fallback.is_float:
            return Recipe.build(**{**given, "exclude": (*given["exclude"], *layers)})
        rules = tuple(Rule(match=name, scheme=self.fallback) for name in layers)
        return Recipe.build(**{**given, "rules": (*rules, *given["rules"])})

    def measure_float(self) -> float:
        """Return the value of the float model."""
        return self._measure(self.job.checkpoint.path)

    def measure(self, layers: Sequence[str]) -> float:
        """Quantize with these layers falling back, and return the value of the result."""
        parent = make_dir(self.scratch)
        with tempfile.TemporaryDirectory(prefix=".slim-tune-", dir=parent) as made:
            self.write(layers, Path(made) / "candidate")
            return self._measure(Path(made) / "candidate")

    def write(
        self,
        layers: Sequence[str],
        output: Path,
        *,
        text: Path | None = None,
        overwrite: bool = False,
    ) -> Report:
        """Quantize with these layers falling back; the report has the perplexity on a text."""
        return quantize(
            self.job.checkpoint.path,
            output,
            recipe=self.recipe(layers),
            calibration=self.data,
            device=self.device,
            text=text,
            overwrite=overwrite,
            trust_remote_code=self.trust_remote_code,
        )

    def fingerprint(self, metric: str) -> str:
        """Return a digest of everything that the values and the ranking depend on."""
        tokens = hashlib.sha256()
        for batch in self.data.batches:
            tokens.update(repr(tuple(batch.shape)).encode() + batch.numpy().tobytes())
        facts = {
            "version": __version__,
            "recipe": self.job.recipe.to_dict(),
            "fallback": str(self.fallback),
            "metric": metric,
            "device": self.device,
            "model": _facts(info.file for info in self.job.checkpoint.tensors.values()),
            "calibration": tokens.hexdigest(),
            "task": self.tasks.to_dict(),
            "data": _facts(self.source.rglob("*") if self.source.is_dir() else (self.source,)),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _measure(self, directory: Path) -> float:
        # The tokenizer is that of the float model: candidates differ in their weights alone.
        tokenizer = load_tokenizer(self.job.checkpoint.path)
        model = load_model(directory, device=self.device, trust_remote_code=self.trust_remote_code)
        return self.tasks.measure(Scorer(model, tokenizer, self.batch)).value


def _facts(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file: whether it is the same without reading it."""
    found = {file.resolve(): file.stat() for file in files if file.is_file()}
    return sorted((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found.items())
