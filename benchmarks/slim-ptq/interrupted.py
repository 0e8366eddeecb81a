"""Whether a run that is killed again and again ends in the bytes of one that was left alone.

Models of up to several gigabytes, so that kills fall on everything that a run does: reading,
calibrating, writing, flushing, verifying.  Every attempt is ended by SIGKILL in a random step,
and the next one goes on with ``--resume``; what the last one leaves is compared file by file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import save, write_llama

COMMAND = "nox -s bench-slim-ptq"
SAMPLES, LENGTH = 4, 128
# model, options, kills, at most so many steps before one
JOBS: dict[str, tuple[dict[str, int], list[str], int, int]] = {
    "w8a8": ({"layers": 24, "hidden": 2048, "inter": 5632}, ["--scheme", "w8a8"], 8, 6),
    "w8a8, hidden states on disk": (
        {"layers": 12, "hidden": 1024, "inter": 2816},
        ["--scheme", "w8a8", "--activation-gib", "0"],
        6,
        4,
    ),
    "w4a16_g128 by gptq": (
        {"layers": 6, "hidden": 1024, "inter": 2816},
        ["--scheme", "w4a16_g128", "--method", "gptq"],
        6,
        2,
    ),
    "w8a16": ({"layers": 24, "hidden": 2048, "inter": 5632}, ["--scheme", "w8a16"], 6, 150),
}
LATE = 2  # of the kills come while what was written is verified
CHANCE = random.Random(0)


def started(model: Path, output: Path, options: list[str], events: Path) -> subprocess.Popen[bytes]:
    """Begin or go on."""
    command = [sys.executable, "-m", "slim_ptq", "quantize", str(model), str(output), *options]
    command += ["--resume", "--events", str(events)]
    return subprocess.Popen(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL
    )


def killed(process: subprocess.Popen[bytes], events: Path, stage: str, steps: int) -> bool:
    """Kill a process somewhere in the step after so many steps of a stage.

    Returns
    -------
    bool
        False if it was done before.
    """
    while process.poll() is None:
        lines = [
            line for line in read(events).splitlines() if line.startswith(f'{{"stage": "{stage}')
        ]
        if len(lines) >= steps:
            share = json.loads(lines[-1])["seconds"] / len(lines) if lines else 1.0
            time.sleep(share * CHANCE.random())
            process.kill()
            return process.wait() != 0
        time.sleep(0.005)
    check(process)
    return False


def check(process: subprocess.Popen[bytes]) -> None:
    """Require that a process ends well."""
    if process.wait():
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def read(file: Path) -> str:
    """Return the complete lines of a file."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1]


def digests(directory: Path) -> dict[str, str]:
    """Return a hash of every file but the reports, which tell times."""
    found = {}
    for file in sorted(directory.iterdir()):
        if not file.name.startswith("slim_report"):
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def last_step(events: Path) -> str:
    """Return the last step that was reported."""
    lines = read(events).splitlines()
    if not lines:
        return "none"
    event = json.loads(lines[-1])
    return f"{event['stage']}: {event['done']} of {event['total']}"


def run(root: Path, name: str) -> dict[str, Any]:
    """Run a job undisturbed and killed, and compare."""
    shape, options, kills, steps = JOBS[name]
    model, whole, out = root / "model", root / "whole", root / "out"
    if not model.exists():
        write_llama(model, **shape)
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if "w8a16" not in options:
        ids = torch.randint(2, 2000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        data = root / "calib.jsonl"
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        options = [*options, "--calib", str(data), "--length", str(LENGTH)]
    begun = time.perf_counter()
    check(started(model, whole, options, root / "events"))
    alone = time.perf_counter() - begun
    expected = digests(whole)
    points: list[str] = []
    for number in range(kills):
        if out.exists():  # the last kill came when all was done
            break
        events = root / f"events-{number}"
        process = started(model, out, options, events)
        late = number >= kills - LATE
        stage, most = ("Verifying", 9) if late else ("Quantizing", steps)
        if not killed(process, events, stage, CHANCE.randint(0, most)):
            break
        points.append(last_step(events))
        print(name, points[-1], flush=True)
    if not out.exists():
        check(started(model, out, options, root / "events"))
    found = digests(out)
    return {
        "options": options[: options.index("--calib")] if "--calib" in options else options,
        "model_gigabytes": round(nbytes / 1e9, 2),
        "seconds_alone": round(alone, 1),
        "killed after": points,
        "files": len(expected),
        "identical": found == expected,
    }


def main() -> None:
    """Run, compare and save; fail if a byte differs."""
    rows = {}
    for name in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = run(Path(folder), name)
        print(name, rows[name]["identical"], flush=True)
    save("interrupted", COMMAND, {"question": "killed, resumed: the same bytes?", "jobs": rows})
    if not all(row["identical"] for row in rows.values()):
        raise SystemExit("a run that was killed ends in other bytes")


if __name__ == "__main__":
    main()
