"""What quantization takes on a GPU or NPU: time, peak memory, and integers against the CPU.

``python device.py npu`` (``cuda`` if not given) quantizes a small random-weight model there and on
the CPU by each job, then models of 1 B and 7 B parameters there.  Where there is no such device it
says so and leaves the results alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import save, write_llama

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import SlimError
from slim_core.recipe import Recipe
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows, windows
from slim_ptq.devices import torch_device

SIZES: dict[str, dict[str, int]] = {
    "1 B": {"layers": 18, "hidden": 2048, "inter": 5632, "vocab": 32000},
    "7 B": {"layers": 32, "hidden": 4096, "inter": 11008, "vocab": 32000},
}
SMALL = {"layers": 2, "hidden": 1024, "inter": 2816}
SAMPLES, LENGTH = 32, 512  # the defaults of the command
JOBS: dict[str, dict[str, Any]] = {
    "w8a16": {"scheme": "w8a16"},
    "w8a8": {"scheme": "w8a8"},
    "w8a8, histogram": {"scheme": "w8a8", "observer": "histogram"},
    "w8a8, smoothquant": {"scheme": "w8a8", "smooth": {"method": "smoothquant"}},
    "w4a16_g128, gptq": {"scheme": "w4a16_g128", "method": "gptq"},
    "w4a16_g128, awq": {"scheme": "w4a16_g128", "smooth": {"method": "awq"}},
    "w4a16_g128, hqq": {"scheme": "w4a16_g128", "method": "hqq"},
}


def random_ids(samples: int) -> TokenWindows:
    """Return calibration windows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 2000, (samples * LENGTH,), generator=generator).tolist()
    return TokenWindows(windows(ids, samples, LENGTH, 4), "random ids")


def costs(kind: str, model: Path, output: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the seconds of a job, and its peak memory on the device in GB."""
    memory = getattr(torch, kind)
    memory.empty_cache()
    memory.reset_peak_memory_stats()
    started = time.perf_counter()
    report = quantize(
        model,
        output,
        recipe=recipe,
        calibration=random_ids(SAMPLES),
        device=kind,
        overwrite=True,
    )
    memory.synchronize()
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_of_stages": {k: round(v, 1) for k, v in report.seconds.items()},
        "peak_gb": round(memory.max_memory_allocated() / 1e9, 2),
    }


def alike(model: Path, root: Path, device: str, recipe: Recipe) -> float:
    """Return the share of integers, in percent, that are those of the CPU, both in float32."""
    for place in ("cpu", device):
        quantize(
            model,
            root / place,
            recipe=recipe,
            calibration=random_ids(8),
            device=place,
            dtype="float32",
            overwrite=True,
        )
    old, new = (open_checkpoint(root / place) for place in ("cpu", device))
    same = total = 0
    for name, info in old.tensors.items():
        if info.dtype.kind in "iu" and name.endswith("weight"):
            same += int((old.load(name) == new.load(name)).sum())
            total += old.load(name).size
    return round(100 * same / total, 4)


def main() -> None:
    """Measure and save."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    try:
        torch_device(kind)
    except SlimError as error:
        print(f"nothing measured: {error}")
        return
    rows: list[dict[str, Any]] = []
    recipes = {name: Recipe.build(**values) for name, values in JOBS.items()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_llama(root / "small", **SMALL)
        for name, recipe in recipes.items():
            share = alike(root / "small", root, kind, recipe)
            rows.append({"job": name, "integers_as_on_the_cpu_percent": share})
            print(rows[-1], flush=True)
        for size, shape in SIZES.items():
            nbytes = write_llama(root / size, **shape)
            for row, recipe in zip(rows, recipes.values(), strict=True):
                found = costs(kind, root / size, root / "out", recipe)
                row[size] = {"model_gb": round(nbytes / 1e9, 2), **found}
                print(row, flush=True)
    save(
        "device",
        f"python benchmarks/slim-ptq/device.py {kind}",
        {
            "question": f"time and memory on a device, {SAMPLES} x {LENGTH} tokens",
            "device": getattr(torch, kind).get_device_name(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
