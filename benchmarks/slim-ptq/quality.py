"""Perplexity of the example model under every scheme, with and without outlier suppression.

On the text of examples/, which the model wrote itself, and on held-out text beside the repository
where that is present.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _common import save

from slim_core.recipe import Recipe
from slim_ptq import evaluate_text, quantize

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
TEXTS = [
    ROOT / "examples" / "eval.txt",
    ROOT.parent / "shared" / "data" / "public_domain_test.txt",
]
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "w8a8, histogram": {"scheme": "w8a8", "observer": "histogram"},
    "w8a8, smoothquant": {"scheme": "w8a8", "smooth": {"method": "smoothquant"}},
    "w8a8, threshold": {"scheme": "w8a8", "smooth": {"method": "threshold"}},
    "w8a8, fallback 2": {"scheme": "w8a8", "fallback": 2},
    "w8a8_dynamic": {"scheme": "w8a8_dynamic"},
    "w8a16": {"scheme": "w8a16"},
    "w8a16_asym": {"scheme": "w8a16_asym"},
    "w8a16_g32": {"scheme": "w8a16_g32"},
}


def main() -> None:
    """Measure and save."""
    texts = [text for text in TEXTS if text.exists()]
    before = {text.name: evaluate_text(MODEL, text).value for text in texts}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, values) in enumerate(RECIPES.items()):
            out = Path(folder) / str(number)
            report = quantize(
                MODEL,
                out,
                recipe=Recipe.build(**values),
                calibration=ROOT / "examples" / "calib.jsonl",
            )
            row: dict[str, Any] = {"recipe": name, "bytes": report.bytes_after}
            for text in texts:
                after = evaluate_text(out, text).value
                row[text.name] = round(after, 3)
                row[f"{text.name}, change"] = f"{100 * (after / before[text.name] - 1):+.2f} %"
            rows.append(row)
    save(
        "quality",
        COMMAND,
        {
            "question": "perplexity of examples/tiny-llama, windows of 512 tokens",
            "float": {name: round(value, 3) for name, value in before.items()},
            "float_bytes": (MODEL / "model.safetensors").stat().st_size,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
