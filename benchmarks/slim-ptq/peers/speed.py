"""How long the same methods take on a model of realistic layers: the whole call of each tool.

    python speed.py prepare WORK   write the model and the cases, and time slim-ptq
    python worker.py TOOL WORK/speed
    python speed.py save WORK      write the results

The first case of each tool is a small one, which pays for imports and compilation.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import OURS, SCHEMES, TOOLS, Scheme, calibration_file, copy_tokenizer
from ours import quantized
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from _common import save, write_llama

COMMAND = "nox -s bench-peers"
HIDDEN, INTER, LAYERS = 1024, 2816, 1
ROWS, LENGTH = 8, 256
GROUPED = Scheme("w4a16_g128", 4, 128)
FRACTIONS = Scheme("w4a16_g128_asym", 4, 128, False)
METHODS: dict[str, dict[str, Scheme]] = {
    OURS: {"gptq": GROUPED, "awq+minmax": GROUPED, "hqq": FRACTIONS},
    "llmcompressor": {"gptq": GROUPED, "awq+minmax": GROUPED},
    "gptqmodel": {"gptq": GROUPED},
    "hqq": {"hqq": FRACTIONS},
}


def prepare(work: Path) -> None:
    """Write what the workers read, and time slim-ptq."""
    folder = work / "speed"
    model, ids = folder / "model", folder / "ids.safetensors"
    if not model.exists():
        write_llama(model, layers=LAYERS, hidden=HIDDEN, inter=INTER)
        copy_tokenizer(model)
        generator = torch.Generator().manual_seed(0)
        save_file({"ids": torch.randint(2, 2048, (ROWS, LENGTH), generator=generator)}, ids)
    small = work / "tiny-llama", calibration_file(work, "tiny-llama", 0), SCHEMES["w4a16_g32_asym"]
    for tool in TOOLS:
        wanted = METHODS.get(tool, {})
        runs = [
            _case(f"{tool}-{name}-{method}", source, tokens, method, scheme)
            for method, large in wanted.items()
            for name, (source, tokens, scheme) in {
                "warm": small,
                "large": (model, ids, large),
            }.items()
        ]
        (folder / f"{tool}.json").write_text(json.dumps(runs, indent=1))
    seconds = {}
    for method, scheme in METHODS[OURS].items():
        quantized(small[0], small[1], small[2], method)
        started = time.perf_counter()
        quantized(model, ids, scheme, method)
        seconds[method] = time.perf_counter() - started
        print(method, seconds[method], flush=True)
        (folder / f"{OURS}.seconds").write_text(json.dumps(seconds))


def _case(name: str, model: Path, ids: Path, method: str, scheme: Scheme) -> dict[str, Any]:
    values = asdict(scheme)
    del values["name"]
    return {
        "name": name,
        "model": str(model),
        "calibration": str(ids),
        "method": method,
        "seed": 0,
        **values,
    }


def results(work: Path) -> None:
    """Save seconds for a million weights."""
    folder = work / "speed"
    millions = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTER) / 1e6
    rows = [
        {"tool": OURS, "method": method, "seconds": seconds}
        for method, seconds in json.loads((folder / f"{OURS}.seconds").read_text()).items()
    ]
    for tool, wanted in METHODS.items():
        for method in wanted if tool != OURS else ():
            file = folder / "out" / f"{tool}-large-{method}.safetensors"
            if not file.exists():
                print(f"{tool}: no {method}, see its .error file or the time it was given")
                continue
            with safe_open(file, framework="pt") as stored:
                seconds = float(stored.metadata()["seconds"])
            rows.append({"tool": tool, "method": method, "seconds": seconds})
    save(
        "peers_speed",
        COMMAND,
        {
            "question": "seconds to quantize a million weights, the whole call, calibration too",
            "model": f"Llama, {LAYERS} layer of {HIDDEN} and {INTER}, random weights",
            "calibration": [ROWS, LENGTH],
            "threads": torch.get_num_threads(),
            "rows": [
                {**row, "seconds_per_million": round(row["seconds"] / millions, 3)} for row in rows
            ],
        },
    )


if __name__ == "__main__":
    {"prepare": prepare, "save": results}[sys.argv[1]](Path(sys.argv[2]).resolve())
