"""Logits of slim-mindspore against those of slim-ptq on the same checkpoints: step 2.

In an environment of slim-mindspore, from the root of the repository, after ``write.py``::

    python benchmarks/slim-mindspore/agreement/compare.py FOLDER

Writes ``results/agreement.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from slim_core.files import write_json
from slim_core.provenance import provenance
from slim_mindspore import load_quantized
from slim_mindspore.hub import read_config
from slim_mindspore.modes import prepare_cpu

RESULTS = Path(__file__).resolve().parents[1] / "results" / "agreement.json"
TOLERANCE = 1e-4


def logits_of(directory: Path, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Return the logits of a checkpoint computed in a dtype."""
    network = load_quantized(directory, replace(read_config(directory), dtype=dtype))
    logits: np.ndarray = network(ms.Tensor(ids.astype(np.int32))).asnumpy()
    return logits


def share(one: np.ndarray, other: np.ndarray) -> float:
    """Return at how many positions of all every logit agrees, percent."""
    return round(100 * float((np.abs(one - other).max(axis=-1) <= TOLERANCE).mean()), 1)


def main() -> None:
    """Compare all schemes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare_cpu()
    rows = {}
    for file in sorted(options.folder.glob("*.npz")):
        with np.load(file) as stored:
            theirs = {dtype: stored[dtype] for dtype in ("float32", "float64")}
            ids = stored["ids"]
        ours = {dtype: logits_of(file.with_suffix(""), ids, dtype) for dtype in theirs}
        gap = {dtype: float(np.abs(ours[dtype] - theirs[dtype]).max()) for dtype in theirs}
        best = {
            side: found["float32"].argmax(-1) for side, found in {"o": ours, "t": theirs}.items()
        }
        rows[file.stem] = {
            "largest_difference_float64": float(f"{gap['float64']:.1e}"),
            "largest_difference_float32": float(f"{gap['float32']:.1e}"),
            "positions_within_1e-4_float64_percent": share(ours["float64"], theirs["float64"]),
            "positions_within_1e-4_float32_percent": share(ours["float32"], theirs["float32"]),
            "same_best_token_float32_percent": round(
                100 * float((best["o"] == best["t"]).mean()), 2
            ),
            "slim_ptq_float32_within_1e-4_of_its_float64_percent": share(*theirs.values()),
        }
        print(file.stem, rows[file.stem], flush=True)
    result = {"tokens": int(ids.size), "rows": rows}
    packages = provenance(["slim-mindspore", "mindspore"])
    write_json(options.output, {**result, "provenance": packages}, mode=0o644)


if __name__ == "__main__":
    main()
