"""Whether peak memory stays within its bound, for any number of layers.

A random Llama of several gigabytes is quantized, once with few layers and once with many, and the
resident memory is followed.  The one with many is quantized again under a limit of the system,
RLIMIT_DATA: all memory of the process that is not a mapped file, resident or not, counts; an
allocation beyond it fails.  It is set when everything is imported, to what the process has then
plus the bound.  ``python memory.py FOLDER`` keeps the models in a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
from _common import save, write_llama
from matplotlib import pyplot

COMMAND = "nox -s bench-slim-ptq"
PLOT = Path(__file__).parents[2] / "packages" / "slim-ptq" / "docs" / "memory.svg"
LAYERS = (12, 48)
HIDDEN, INTER, VOCAB = 2048, 5632, 32000
SAMPLES, LENGTH, BATCH = 8, 512, 4
SHARD = 1 << 29
BLOCK = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTER)  # bytes, as stored
EMBEDDING = 2 * VOCAB * HIDDEN
ACTIVATIONS = 2 * SAMPLES * LENGTH * HIDDEN  # bfloat16


class Job(NamedTuple):
    """What is run, the stage whose steps are counted, and the bound in bytes."""

    scheme: str
    dtype: str
    stage: str
    bound: int


JOBS = {
    "w8a8": Job("w8a8", "float32", "Quantizing blocks", 2 * (3 * BLOCK + ACTIVATIONS) + EMBEDDING),
    "w8a8 in bfloat16": Job(
        "w8a8", "bfloat16", "Quantizing blocks", 3 * BLOCK + ACTIVATIONS + EMBEDDING
    ),
    "w8a16": Job("w8a16", "auto", "Quantizing weights", 2 * SHARD),
}
MB = 1e6
# Free memory that glibc keeps for later counts under the limit, although it is not resident.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 22)}

RUN = """
import json, resource, sys
from pathlib import Path
model, output, scheme, dtype, bound, samples, length, batch = sys.argv[1:]
import torch
import transformers.models.llama.modeling_llama
from slim_core.progress import writing_events
from slim_ptq.api import quantize
from slim_ptq.calibration.text import TokenWindows, windows
samples, length = int(samples), int(length)
ids = torch.randint(2, 2000, (samples * length,), generator=torch.Generator().manual_seed(0))
data = TokenWindows(windows(ids.tolist(), samples, length, int(batch)), "random ids")
status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
held = int(status["VmData"].split()[0]) << 10
limit = held + int(bound) if int(bound) else resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print("begin", flush=True)
with writing_events(f"{output}.events"):
    calibration = data if scheme == "w8a8" else None
    quantize(model, output, scheme=scheme, calibration=calibration, dtype=dtype)
"""


def measured(model: Path, output: Path, job: Job, *, limited: bool) -> dict[str, Any]:
    """Quantize in a fresh process and follow its memory.

    Returns
    -------
    dict
        ``base``: resident bytes before the work; ``peak``: of the work, what was there before
        taken off; ``steps``: the largest of each step (the last one is what comes after them).
    """
    numbers = [job.bound if limited else 0, SAMPLES, LENGTH, BATCH]
    arguments = [str(model), str(output), job.scheme, job.dtype, *map(str, numbers)]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(GIVE_BACK if limited else {})},
    )
    assert process.stdout is not None
    process.stdout.readline()
    base = _resident(process.pid)
    started = time.perf_counter()
    events = Path(f"{output}.events")
    steps: list[int] = []
    while process.poll() is None:
        done = _steps(events, job.stage)
        steps += [0] * (done + 1 - len(steps))
        steps[-1] = max(steps[-1], _resident(process.pid) - base)
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{job.scheme} of {model} ended with {process.returncode}")
    seconds = time.perf_counter() - started
    return {"base": base, "peak": max(steps), "steps": steps, "seconds": round(seconds, 1)}


def _resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _steps(events: Path, stage: str) -> int:
    if not events.exists():
        return 0
    lines = [line for line in events.read_text().splitlines() if f'"{stage}"' in line]
    return int(json.loads(lines[-1])["done"]) if lines else 0


def main() -> None:
    """Measure, save and plot."""
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))


def run(root: Path) -> None:
    """Do it all with models in a folder."""
    rows = []
    for layers in LAYERS:
        model = root / f"llama-{layers}"
        if not model.exists():
            write_llama(model, layers=layers, hidden=HIDDEN, inter=INTER, vocab=VOCAB)
        for number, (name, job) in enumerate(JOBS.items()):
            found = measured(model, root / f"out-{layers}-{number}", job, limited=False)
            row = {"layers": layers, "job": name, "bound": job.bound, **found}
            if layers == LAYERS[-1]:
                held = measured(model, root / f"held-{layers}-{number}", job, limited=True)
                row["peak_under_limit"] = held["peak"]
            rows.append(row)
            print(row, flush=True)
    plot(rows)
    save(
        "memory",
        COMMAND,
        {
            "question": "resident memory over the layers, beyond that of the imports, in MB",
            "limit": "RLIMIT_DATA = data segment after the imports + bound",
            "allocator_under_limit": GIVE_BACK,
            "model_gigabytes": round((LAYERS[-1] * BLOCK + 2 * EMBEDDING) / 1e9, 2),
            "block_mb": {"bfloat16": BLOCK / MB, "float32": 2 * BLOCK / MB},
            "embedding_mb": EMBEDDING / MB,
            "activations_mb": ACTIVATIONS / MB,
            "shard_mb": SHARD / MB,
            "rows": [
                {
                    "layers": row["layers"],
                    "job": row["job"],
                    "bound_mb": round(row["bound"] / MB, 1),
                    "peak_mb": round(row["peak"] / MB, 1),
                    **(
                        {"peak_under_limit_mb": round(row["peak_under_limit"] / MB, 1)}
                        if "peak_under_limit" in row
                        else {}
                    ),
                    "imports_mb": round(row["base"] / MB, 1),
                    "seconds": row["seconds"],
                }
                for row in rows
            ],
        },
    )


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw resident memory over the share of the work that is done."""
    pyplot.rcParams["svg.hashsalt"] = "slim"
    figure, panels = pyplot.subplots(1, len(JOBS), figsize=(12, 3.2))
    for panel, (name, job) in zip(panels, JOBS.items(), strict=True):
        for row in (row for row in rows if row["job"] == name):
            size = row["layers"] / max(1, len(row["steps"]) - 1)
            places = [index * size for index in range(len(row["steps"]))]
            panel.step(places, [value / MB for value in row["steps"]], where="post", lw=1)
            panel.plot([], [], color=panel.lines[-1].get_color(), label=f"{row['layers']} layers")
        panel.axhline(job.bound / MB, color="black", ls="--", lw=1, label="bound")
        panel.set(
            title=f"{name}: {job.stage.lower()}",
            xlabel="layers done",
            ylabel="MB",
            ylim=(0, None),
        )
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
