"""What each knob of sparse quantization does to the codes and to the perplexity.

The size is that of an ideal order-0 coder of the codes of a layer, which slim-compress comes near.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import save

from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_ptq import evaluate_text, quantize

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
TEXTS = [
    ROOT / "examples" / "eval.txt",
    ROOT.parent / "shared" / "data" / "public_domain_test.txt",
]
METHODS: dict[str, dict[str, Any]] = {
    "rows, fraction 0.01": {},
    "rows, fraction 0.02": {"fraction": 0.02},
    "rows, fraction 0.05": {"fraction": 0.05},
    "rows, fraction 0.1": {"fraction": 0.1},
    "rows, sigma_factor 3": {"sigma_factor": 3.0},
    "rows, sigma_factor 3.5": {"sigma_factor": 3.5},
    "rows, sigma_factor 4": {"sigma_factor": 4.0},
    "rows, fraction 0.01, nonuniform": {"nonuniform": True},
    "rows, fraction 0.05, nonuniform": {"nonuniform": True, "fraction": 0.05},
    "whole weight, fraction 0.01": {"scope": "tensor"},
    "whole weight, fraction 0.05": {"scope": "tensor", "fraction": 0.05},
    "whole weight, fraction 0.1": {"scope": "tensor", "fraction": 0.1},
}


def main() -> None:
    """Measure and save."""
    texts = [text for text in TEXTS if text.exists()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(METHODS.items()):
            out = Path(folder) / str(number)
            method = {"name": "sparse", **options}
            quantize(
                MODEL,
                out,
                recipe=Recipe.build(scheme="w8a8s", method=method),
                calibration=ROOT / "examples" / "calib.jsonl",
            )
            perplexities = {text.name: round(evaluate_text(out, text).value, 2) for text in texts}
            rows.append({"method": name, **codes_of(out), **perplexities})
    save(
        "sparse",
        COMMAND,
        {
            "question": "codes and perplexity of examples/tiny-llama as W8A8S",
            "float": {text.name: round(evaluate_text(MODEL, text).value, 2) for text in texts},
            "rows": rows,
        },
    )


def codes_of(directory: Path) -> dict[str, Any]:
    """Return what the codes of all layers are like together."""
    stored = QuantizedCheckpoint(directory)
    total = small = zeros = 0
    bits = 0.0
    for name in stored.layers:
        codes = stored.layer(name).codes
        total += codes.size
        small += int((np.abs(codes) <= 7).sum())
        zeros += int((codes == 0).sum())
        counts = np.unique(codes, return_counts=True)[1]
        bits -= float((counts * np.log2(counts / codes.size)).sum())
    return {
        "codes of 4 bits": round(small / total, 4),
        "zeros": round(zeros / total, 4),
        "entropy, bits": round(bits / total, 3),
    }


if __name__ == "__main__":
    main()
