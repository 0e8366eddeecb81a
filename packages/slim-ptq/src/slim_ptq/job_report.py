"""The report of a job of the modern interface."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from slim_core.checkpoint import open_checkpoint
from slim_core.files import PathLike
from slim_core.provenance import provenance
from slim_core.report import LayerReport, Report
from slim_ptq.__about__ import __version__
from slim_ptq.evaluate import Perplexity
from slim_ptq.prepare import Prepared

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes but on macOS


class Clock:
    """Seconds of the stages so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """End a stage and begin the next one."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def job_report(
    job: Prepared,
    layers: list[LayerReport],
    staging: Path,
    before: Perplexity | None,
    after: Perplexity | None,
    text: PathLike | None,
    clock: Clock,
    where: Mapping[str, str],
) -> Report:
    """Return the report of a finished job.

    Parameters
    ----------
    layers : list of LayerReport
        In any order.
    staging : Path
        What was written.
    before, after : Perplexity, optional
        On ``text``, if it was measured.
    where : mapping
        Kind of device, and the dtype of the blocks if they ran.
    """
    plan = job.plan
    order = {layer.name: index for index, layer in enumerate(plan.layers)}
    report = Report(
        tool=f"slim-ptq {__version__}",
        model=job.checkpoint.path.name,
        scheme=str(job.recipe.scheme),
        format=plan.format,
        layers=tuple(sorted(layers, key=lambda layer: order[layer.name])),
        bytes_before=_weight_bytes(job.checkpoint.path),
        bytes_after=_weight_bytes(staging),
        calibration=None if job.data is None else job.data.to_dict(),
        fallbacks=tuple((layer.name, layer.reason) for layer in plan.layers if not layer.asked),
        seconds={stage: round(value, 3) for stage, value in clock.seconds.items() if value >= 1e-3},
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        provenance=provenance(
            ["slim-ptq", "torch", "transformers"],
            recipe=job.recipe.to_dict(),
            config=job.checkpoint.config,
        )
        | dict(where),
    )
    if before is None or after is None or text is None:
        return report
    return replace(
        report,
        perplexity_before=before.value,
        perplexity_after=after.value,
        perplexity_text=Path(text).name,
        perplexity_tokens=after.tokens,
    )


def _weight_bytes(directory: Path) -> int:
    files = {info.file for info in open_checkpoint(directory).tensors.values()}
    return sum(file.stat().st_size for file in files)
