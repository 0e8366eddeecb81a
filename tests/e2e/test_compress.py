"""slim-ptq's sparse weights through slim-compress and back, by the installed commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open


def read(directory: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a directory; bfloat16 ones as their bits."""
    import ml_dtypes  # noqa: F401  (numpy learns bfloat16)

    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-bloom"])
@pytest.mark.parametrize("scope", ["row", "tensor"])  # lowbit and co_sparse
def test_sparse_weights_come_back(
    model: str, scope: str, examples: Path, run: Any, tmp_path: Path
) -> None:
    raw, small, back = (tmp_path / name for name in ("raw", "small", "back"))
    recipe = tmp_path / "sparse.yaml"
    recipe.write_text(f"scheme: w8a8s\nmethod: {{name: sparse, fraction: 0.01, scope: {scope}}}\n")
    calib = ("--calib", examples / "calib.jsonl", "--samples", 4)
    run("slim-ptq", "quantize", examples / model, raw, "--recipe", recipe, *calib)
    original = read(raw)
    types = json.loads(next(raw.glob("quant_model_description*.json")).read_text())
    sparse = [n for n, kind in types.items() if kind == "W8A8S" and n.endswith(".weight")]
    sparse = [name for name in sparse if original[name].ndim == 2]
    assert len(sparse) >= 16

    run("slim-compress", "compress", raw, small, "--verify")
    stored = read(small)
    for name in sparse:
        stem = name.removesuffix(".weight")
        sizes = [stored[f"{stem}.{part}"].nbytes for part in ("weight", "index", "info")]
        assert sum(sizes) < 0.6 * original[name].size
    run("slim-compress", "verify", small, "--original", raw)

    run("slim-compress", "decompress", small, back)
    restored = read(back)
    assert restored.keys() == original.keys()
    for name, array in original.items():
        assert restored[name].dtype == array.dtype
        assert restored[name].tobytes() == array.tobytes()
