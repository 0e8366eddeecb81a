"""Every scheme by every method and in every format: perplexity, size and seconds.

Writes ``results/matrix.json`` and the table in ``packages/slim-ptq/docs/evidence.md``.  Names of
models as arguments measure these alone and keep the rows of the others.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import RESULTS, save
from _models import Case, copy_case, text_case

from slim_core.errors import PlanError, StructureError
from slim_core.formats import FORMATS
from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize
from slim_ptq.methods import METHODS

COMMAND = "nox -s bench-slim-ptq"
PAGE = Path(__file__).parents[2] / "packages" / "slim-ptq" / "docs" / "evidence.md"
SCHEMES = (
    *("w8a16", "w8a16_g32", "w4a16", "w4a16_g32", "w4a16_g32_asym", "nf4"),
    *("w8a8", "w8a8_mix", "w8a8_dynamic", "w8a8s"),
    *("w4a8_dynamic", "w4a8_dynamic_g32", "w4a4_dynamic", "w4a4_flatquant_dynamic"),
    *("w8a8fp8_dynamic", "w8a8_mxfp8", "w4a8_mxfp", "w4a16_mxfp4", "w4a4_mxfp4"),
    "w4a4_mxfp4_flatquant",
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
    "w4a16_g32, awq": {"scheme": "w4a16_g32", "smooth": "awq"},
    "w4a4_dynamic, rotated": {"scheme": "w4a4_dynamic", "rotate": {}},
    "w4a4_dynamic, rotated, gptq": {"scheme": "w4a4_dynamic", "rotate": {}, "method": "gptq"},
}

MODELS: dict[str, Callable[[], Case]] = {
    "tiny-llama": functools.partial(text_case, "tiny-llama", samples=16, length=256),
    "tiny-bloom": functools.partial(text_case, "tiny-bloom", samples=16, length=256),
    "copy-llama": functools.partial(copy_case, samples=16, length=256),
}


def main() -> None:
    """Measure, save, and write the page."""
    chosen = sys.argv[1:] or list(MODELS)
    rows = [row for row in earlier() if row["model"] not in chosen]
    for model in chosen:
        case = MODELS[model]()
        rows.append(
            {
                "model": model,
                "recipe": "float",
                "perplexity": round(case.score(load_model(case.directory)), 3),
                "bytes": (case.directory / "model.safetensors").stat().st_size,
                "seconds": 0.0,
            }
        )
        recipes = {
            f"{scheme}, {method}": {"scheme": scheme, "method": method}
            for scheme in SCHEMES
            for method in METHODS
        } | OTHERS
        for name, values in recipes.items():
            row = measure(case, name, values)
            if row is not None:
                print(row, flush=True)
                rows.append(row)
    case = MODELS["tiny-llama"]()
    formats = [
        {"scheme": scheme} | {form: size(case, scheme, form) for form in FORMATS if form != "float"}
        for scheme in SCHEMES
    ]
    result = {
        "question": "perplexity of the models of examples/ on eval.txt, windows of 512 tokens; "
        "of copy-llama on the second halves of repeated random sequences",
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


def measure(case: Case, name: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row, None where the model or the plan says that these do not go together."""
    with tempfile.TemporaryDirectory() as folder:
        out, recipe = Path(folder) / "out", Recipe.build(**values)
        started = time.perf_counter()
        try:
            report = quantize(case.directory, out, recipe=recipe, calibration=case.calibration)
        except (PlanError, StructureError):
            return None
        seconds = time.perf_counter() - started
        perplexity = case.score(load_model(out))
    return {
        "model": case.name,
        "recipe": name,
        "perplexity": round(perplexity, 3),
        "bytes": report.bytes_after,
        "seconds": round(seconds, 1),
    }


def size(case: Case, scheme: str, form: str) -> int | None:
    """Return the bytes of a checkpoint, None where the format does not hold the scheme."""
    with tempfile.TemporaryDirectory() as folder:
        out, recipe = Path(folder) / "out", Recipe.build(scheme=scheme, format=form)
        try:
            report = quantize(case.directory, out, recipe=recipe, calibration=case.calibration)
        except PlanError:
            return None
    return report.bytes_after


def page(result: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    lines = [
        "# Evidence: every scheme, method and format",
        "",
        f"{result['question'].capitalize()};".replace("; of", ";\nof"),
        "calibration on examples/calib.jsonl (copy-llama: sequences of its kind), 16 x 256 tokens.",
        f"Written by `{COMMAND}` (benchmarks/slim-ptq/matrix.py). Differences below about 0.1 are",
        "within the noise of so small models and text; the seconds are those of the whole run.",
        "What a plan refuses by name is not in the table: learned rounding of types without",
        "integers, or microscaling of tiny-llama, whose width of 352 holds no pairs of groups.",
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
