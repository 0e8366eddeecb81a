"""What it costs in quality to calibrate in bfloat16 in the place of float32.

The bfloat16 models of examples/ are quantized with each, several times with other calibration
windows, and run in float32.  The measure is the mean Kullback-Leibler divergence from the float
model in thousandths of a nat a token, on held-out lines.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import save
from methods import ROOT, halves, likelihoods
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows

COMMAND = "nox -s bench-slim-ptq"
MODELS = ("tiny-llama", "tiny-bloom")
DTYPES = ("float32", "bfloat16")
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "w8a8, smoothquant": {"scheme": "w8a8", "smooth": {"method": "smoothquant"}},
    "w8a8_dynamic, gptq": {"scheme": "w8a8_dynamic", "method": "gptq"},
    "w4a16_g32, gptq": {"scheme": "w4a16_g32", "method": "gptq"},
    "w4a16_g32, awq": {"scheme": "w4a16_g32", "smooth": {"method": "awq"}},
}
PARTS = 4  # of the calibration windows, each of which is one run


def main() -> None:
    """Measure and save."""
    rows = [row for model in MODELS for row in rows_of(model)]
    question = f"divergence after calibration in float32 and in bfloat16, {PARTS} calibration sets"
    save("compute_dtype", COMMAND, {"question": question, "rows": rows})


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the divergences of a model, means over the calibration sets, for each recipe."""
    path = ROOT / "examples" / name
    seen, held_out = halves(name)
    exact = likelihoods(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), held_out)
    windows = torch.cat(seen)
    data = [TokenWindows(part.split(4), "lines") for part in windows.chunk(PARTS)]
    rows = []
    for label, values in RECIPES.items():
        found: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for dtype in DTYPES:
            for part in data:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    recipe = Recipe.build(**values)
                    quantize(path, out, recipe=recipe, calibration=part, dtype=dtype)
                    after = likelihoods(load_model(out), held_out)
                moved = functional.kl_div(after, exact, reduction="sum", log_target=True)
                found[dtype].append(1000 * float(moved) / exact.shape[:2].numel())
        more = [b - a for a, b in zip(*found.values(), strict=True)]
        rows.append(
            {
                "model": name,
                "recipe": label,
                **{dtype: round(statistics.mean(seen), 3) for dtype, seen in found.items()},
                "more": round(statistics.mean(more), 3),
                "error_of_more": round(statistics.stdev(more) / PARTS**0.5, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
