"""Every scheme by every method and in every format: perplexity, size and seconds.

Writes ``results/matrix.json`` and the table in ``packages/slim-ptq/docs/evidence.md``.  Names of
models as arguments measure these alone and keep the rows of the others.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, save

from slim_core.errors import PlanError
from slim_core.formats import FORMATS
from slim_core.recipe import Recipe
from slim_ptq import evaluate_text, quantize
from slim_ptq.methods import METHODS

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
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


# By model: methods, and the further recipes.  signround takes minutes, so it has two of these.
MODELS: dict[str, tuple[list[str], dict[str, dict[str, Any]]]] = {
    "tiny-llama": ([name for name in METHODS if name != "signround"], OTHERS),
    "tiny-bloom": (
        ["minmax", "gptq", "sparse"],
        {
            name: OTHERS[name]
            for name in ("w8a8, smoothquant", "w8a8, iterative", "w8a8, int8 cache")
        },
    ),
}


def main() -> None:
    """Measure, save, and write the page."""
    chosen = sys.argv[1:] or list(MODELS)
    rows = [row for row in earlier() if row["model"] not in chosen]
    for model in chosen:
        methods, others = MODELS[model]
        rows.append(
            {
                "model": model,
                "recipe": "float",
                "perplexity": round(evaluate_text(EXAMPLES / model, TEXT).value, 3),
                "bytes": (EXAMPLES / model / "model.safetensors").stat().st_size,
                "seconds": 0.0,
            }
        )
        recipes = {
            f"{scheme}, {method}": {"scheme": scheme, "method": method}
            for scheme in SCHEMES
            for method in methods
        } | others
        for name, values in recipes.items():
            row = measure(EXAMPLES / model, name, values)
            if row is not None:
                print(row, flush=True)
                rows.append(row)
    formats = [
        {"scheme": scheme, **sizes}
        for scheme in SCHEMES
        if (sizes := {form: size(scheme, form) for form in FORMATS if form != "float"})
    ]
    result = {
        "question": "perplexity of the models of examples/ on eval.txt, windows of 512 tokens",
        "rows": rows,
        "formats": formats,
    }
    save("matrix", COMMAND, result)
    PAGE.write_text(page(result), encoding="utf-8")


def earlier() -> list[dict[str, Any]]:
    """Return the rows of the last run."""
    file = RESULTS / "matrix.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    return rows


def measure(model: Path, name: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row, None where the plan says that these do not go together."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            report = quantize(
                model,
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
        "model": model.name,
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
                EXAMPLES / "tiny-llama",
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
        f"Written by `{COMMAND}` (benchmarks/slim-ptq/matrix.py). Differences below about 0.1 are",
        "within the noise of so small models and text; the seconds are those of the whole run.",
        "",
        "| model | scheme and method | perplexity | bytes | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {row['model']} | {row['recipe']} | {row['perplexity']} | {row['bytes']:,} "
            f"| {row['seconds']} |"
            for row in result["rows"]
        ),
        "",
        "The two Ascend formats hold the same integers, so their perplexity is the same. Bytes of",
        "tiny-llama by format, empty where the format does not hold the scheme:",
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
