"""Every scheme by every method and in every format: perplexity, size and seconds.

Writes ``results/matrix.json`` and the table in ``packages/slim-ptq/docs/evidence.md``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from _common import save

from slim_core.errors import PlanError
from slim_core.formats import FORMATS
from slim_core.recipe import Recipe
from slim_ptq import evaluate_text, quantize
from slim_ptq.methods import METHODS

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
CALIBRATION = ROOT / "examples" / "calib.jsonl"
TEXT = ROOT / "examples" / "eval.txt"
PAGE = ROOT / "packages" / "slim-ptq" / "docs" / "evidence.md"
SCHEMES = (
    *("w8a16", "w8a16_g32", "w4a16", "w4a16_g32", "w4a16_g32_asym", "nf4"),
    *("w8a8", "w8a8_mix", "w8a8_dynamic", "w8a8s"),
    *("w4a8_dynamic", "w4a8_dynamic_g32", "w4a4_dynamic", "w4a4_flatquant_dynamic"),
)
OTHERS: dict[str, dict[str, Any]] = {
    "w8a8, smoothquant": {"scheme": "w8a8", "smooth": "smoothquant"},
    "w8a8, iterative": {"scheme": "w8a8", "smooth": "iterative"},
    "w8a8, rotated": {"scheme": "w8a8", "rotate": {}},
    "w8a8, int8 cache": {"scheme": "w8a8", "kv_cache": {}},
    "w8a8, down in w8a16": {
        "scheme": "w8a8",
        "rules": [{"match": "*down_proj", "scheme": "w8a16"}],
    },
    "w4a16, signround": {"scheme": "w4a16", "method": "signround"},
    "w4a16_g32, signround": {"scheme": "w4a16_g32", "method": "signround"},
    "w4a16_g32, awq": {"scheme": "w4a16_g32", "smooth": "awq"},
    "w4a4_dynamic, rotated": {"scheme": "w4a4_dynamic", "rotate": {}},
    "w4a4_dynamic, rotated, gptq": {"scheme": "w4a4_dynamic", "rotate": {}, "method": "gptq"},
}


def main() -> None:
    """Measure, save, and write the page."""
    recipes = {
        f"{scheme}, {method}": {"scheme": scheme, "method": method}
        for scheme in SCHEMES
        for method in METHODS
        if method != "signround"  # takes minutes; among the others for two schemes
    } | OTHERS
    rows = []
    for name, values in recipes.items():
        row = measure(name, values)
        if row is not None:
            print(row, flush=True)
            rows.append(row)
    formats = [
        {"scheme": scheme, **sizes}
        for scheme in SCHEMES
        if (sizes := {form: size(scheme, form) for form in FORMATS if form != "float"})
    ]
    result = {
        "question": "perplexity of examples/tiny-llama on examples/eval.txt, windows of 512 tokens",
        "float": round(evaluate_text(MODEL, TEXT).value, 3),
        "float_bytes": (MODEL / "model.safetensors").stat().st_size,
        "rows": rows,
        "formats": formats,
    }
    save("matrix", COMMAND, result)
    PAGE.write_text(page(result), encoding="utf-8")


def measure(name: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row, None where the plan says that these do not go together."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            report = quantize(
                MODEL,
                Path(folder) / "out",
                recipe=Recipe.build(**values),
                calibration=CALIBRATION,
                samples=16,
                length=256,
            )
        except PlanError:
            return None
        seconds = time.perf_counter() - started
        perplexity = evaluate_text(Path(folder) / "out", TEXT).value
    return {
        "recipe": name,
        "perplexity": round(perplexity, 3),
        "bytes": report.bytes_after,
        "seconds": round(seconds, 1),
    }


def size(scheme: str, form: str) -> int | None:
    """Return the bytes of a checkpoint, None where the format does not hold the scheme."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = quantize(
                MODEL,
                Path(folder) / "out",
                recipe=Recipe.build(scheme=scheme, format=form),
                calibration=CALIBRATION,
                samples=2,
                length=64,
            )
        except PlanError:
            return None
    return report.bytes_after


def page(result: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    lines = [
        "# Evidence: every scheme, method and format",
        "",
        f"{result['question'].capitalize()};",
        "calibration on examples/calib.jsonl, 16 windows of 256.",
        f"Written by `{COMMAND}` (benchmarks/slim-ptq/matrix.py). Float: perplexity "
        f"{result['float']}, {result['float_bytes']:,} bytes. Differences below about 0.1 are",
        "within the noise of so small a model and text; the seconds are those of the whole run.",
        "",
        "| scheme and method | perplexity | bytes | seconds |",
        "|---|---|---|---|",
        *(
            f"| {row['recipe']} | {row['perplexity']} | {row['bytes']:,} | {row['seconds']} |"
            for row in result["rows"]
        ),
        "",
        "The two Ascend formats hold the same integers, so their perplexity is the same. Bytes of",
        "the checkpoint by format, empty where the format does not hold the scheme:",
        "",
        "| scheme | " + " | ".join(name for name in FORMATS if name != "float") + " |",
        "|---" * len(FORMATS) + "|",
        *(
            f"| {row['scheme']} | "
            + " | ".join(
                "" if row[name] is None else f"{row[name]:,}" for name in FORMATS if name != "float"
            )
            + " |"
            for row in result["formats"]
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
