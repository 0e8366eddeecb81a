"""What more processes bring.

They are started by torchrun with one thread each.  Their time is that of the quantization in the
report, without the imports.  ``python processes.py JOB...`` measures some of the jobs alone.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, save, write_llama

COMMAND = "nox -s bench-slim-ptq"
PROCESSES = (1, 2, 4)
ROUNDS = 3
LENGTH = 512
JOBS: dict[str, tuple[dict[str, int], int, list[str]]] = {  # model, windows, options
    "w8a8": ({"layers": 2, "hidden": 2048, "inter": 5632}, 16, ["--scheme", "w8a8"]),
    "w4a16_g128 by gptq": (
        {"layers": 2, "hidden": 1024, "inter": 2816},
        8,
        ["--scheme", "w4a16_g128", "--method", "gptq"],
    ),
    "w8a16": ({"layers": 8, "hidden": 2048, "inter": 5632}, 0, ["--scheme", "w8a16"]),
}


def seconds_of(model: Path, output: Path, options: list[str], processes: int) -> float:
    """Return the seconds that some processes quantize, imports left out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(port), "-m", "slim_ptq", "quantize", str(model), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, *options, "--overwrite"], check=True, env=environment, capture_output=True
    )
    report = json.loads((output / "slim_report.json").read_text())
    return float(report["seconds"]["quantize"])


def measured(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the median seconds and the efficiency for every number of processes."""
    shape, windows, options = JOBS[name]
    write_llama(root / "model", **shape)
    if windows:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 2000, (windows, LENGTH), generator=generator).tolist()
        data = root / "calib.jsonl"
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        options = [*options, "--calib", str(data), "--length", str(LENGTH)]
    seconds: dict[int, list[float]] = {count: [] for count in PROCESSES}
    for _ in range(ROUNDS):
        for count, times in seconds.items():
            times.append(seconds_of(root / "model", root / "out", options, count))
            print(name, count, round(times[-1], 2), flush=True)
    alone = statistics.median(seconds[1])
    return {
        str(count): {
            "seconds": round(statistics.median(times), 2),
            "range": [round(min(times), 2), round(max(times), 2)],
            "efficiency": round(alone / statistics.median(times) / count, 3),
        }
        for count, times in seconds.items()
    }


def main() -> None:
    """Measure and save."""
    wanted = sys.argv[1:] or list(JOBS)
    file = RESULTS / "processes.json"
    jobs = json.loads(file.read_text())["jobs"] if sys.argv[1:] and file.exists() else {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            jobs[name] = measured(Path(folder), name)
    save(
        "processes",
        COMMAND,
        {
            "question": f"processes of one thread each, medians of {ROUNDS} runs in turns",
            "tokens": {name: windows * LENGTH for name, (_, windows, _) in JOBS.items()},
            "oversubscribed_from": (os.cpu_count() or 1) + 1,
            "jobs": jobs,
        },
    )


if __name__ == "__main__":
    main()
