"""The whole way on real models: slim-ptq writes W8A8S, slim-compress packs, verifies, restores it.

Needs slim-ptq (``pip install slim-ptq``) and, beside the repository, the shared models; without
slim-ptq nothing is measured, without the models the examples of the repository take their place.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from support.measure import ROOT, save
from support.peers import peers

from slim_compress import entropy_ratio
from slim_compress.checkpoint import (
    compress_checkpoint,
    decompress_checkpoint,
    open_compressed,
    verify_checkpoint,
)
from slim_core.checkpoint import open_checkpoint

MODELS = ("tiny-llama", "tiny-bloom")
METHODS = {
    "lowbit": {"is_lowbit": True},
    "lowbit, use_sigma": {"is_lowbit": True, "use_sigma": True, "sigma_factor": 3.0},
    "co_sparse": {"co_sparse": True},
}
FRACTION = 0.01
SAMPLES = 16


def source_of(name: str) -> Path:
    shared = ROOT / ".." / "shared" / "models" / name
    return shared if shared.exists() else ROOT / "examples" / name


def quantize(model: str, method: str, target: Path) -> None:
    """Write the W8A8S files of a model, as a script for the classic interface does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slim_ptq import Calibrator, QuantConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source_of(model))
    network = AutoModelForCausalLM.from_pretrained(source_of(model), dtype=torch.float32)
    lines = (ROOT / "examples" / "calib.jsonl").read_text().splitlines()[:SAMPLES]
    samples = [tokenizer(json.loads(line)["text"], return_tensors="pt") for line in lines]
    calib = [[s["input_ids"][:, :256], s["attention_mask"][:, :256]] for s in samples]
    config = QuantConfig(4, 8, mm_tensor=False, fraction=FRACTION, **METHODS[method])
    calibrator = Calibrator(network, config, calib_data=calib)
    calibrator.run()
    calibrator.save(str(target), save_type=["safe_tensor"])


def measure(model: str, method: str, scratch: Path) -> dict[str, object]:
    raw, small, back = (scratch / name for name in ("raw", "small", "back"))
    quantize(model, method, raw)
    summary = compress_checkpoint(raw, small, verify=True)
    assert verify_checkpoint(small, raw) == summary.tensors
    decompress_checkpoint(small, back)
    first, second = open_checkpoint(raw), open_checkpoint(back)
    assert set(first.tensors) == set(second.tensors)
    assert all(np.array_equal(first.load(n), second.load(n)) for n in first.tensors)
    matrices = [first.load(name) for name in open_compressed(small).compressed]
    size = sum(matrix.size for matrix in matrices)
    row: dict[str, object] = {
        "matrices": len(matrices),
        "bytes": size,
        "zeros": float(np.mean(np.concatenate([m.ravel() for m in matrices]) == 0)),
        "entropy of each": sum(entropy_ratio(m) * m.size for m in matrices) / size,
        "slc1": summary.stored_bytes / size,
    }
    for peer in peers():
        row[peer.name] = sum(len(peer.compress(m.tobytes())) for m in matrices) / size
    row["every tensor equal"] = True
    return row


def main() -> int:
    if importlib.util.find_spec("slim_ptq") is None:
        print("slim-ptq is not installed: nothing to compress")
        return 0
    rows: dict[str, dict[str, dict[str, object]]] = {}
    for model in MODELS:
        rows[model] = {}
        for method in METHODS:
            with tempfile.TemporaryDirectory() as scratch:
                row = measure(model, method, Path(scratch))
            rows[model][method] = row
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(model, method, shown, flush=True)
    save("real_models", {"fraction": FRACTION, "models": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
