"""Timing and reporting shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import slim_compress
from slim_compress import _native

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROOT = Path(__file__).resolve().parents[3]


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, load, versions."""
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        facts = {key.strip(): value.strip() for key, value in rows}
        model = " ".join(facts.get(key, "") for key in ("model name", "cpu family", "model"))
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "slim_compress": slim_compress.__version__,
        "instruction_sets": _native.instruction_sets(),
    }


def best_seconds(
    work: Callable[[], object], repeats: int, *, clock: Callable[[], float] = time.thread_time
) -> float:
    """Return the shortest of several runs; by default CPU time, which other programs slow less."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def save(name: str, results: dict[str, Any]) -> None:
    """Write results with the command and machine that made them."""
    RESULTS.mkdir(exist_ok=True)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    record = {"command": f"python {script}", "machine": machine(), **results}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
