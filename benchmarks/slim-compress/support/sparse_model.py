"""A W8A8S checkpoint from a float one, by the published formulas, without a quantizer.

Every 2-D weight of a linear layer becomes int8 codes (lowbit or co_sparse, per channel, fraction
0.01); input scale and offset are fixed stand-ins (1/32 and 0), since there are no activations here;
``deq_scale`` holds the bits of the float32 product of both scales and ``quant_bias`` is zero.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support.datasets import co_sparse, lowbit

from slim_core.checkpoint import ShardWriter, copy_side_files, open_checkpoint

METHODS = {"lowbit": lowbit, "co_sparse": co_sparse}
INPUT_SCALE = np.float32(1 / 32)


def write_sparse_model(source: Path, target: Path, method: str) -> list[str]:
    """Write the checkpoint and return the names of its sparse weights."""
    checkpoint = open_checkpoint(source)
    target.mkdir()
    types: dict[str, str] = {}
    sparse = []
    with ShardWriter(target, "quant_model_weight_w8a8s") as writer:
        for name in checkpoint.tensors:
            array = checkpoint.load(name)
            linear = array.ndim == 2 and ".layers." in name
            tensors = quantized(name, array, method) if linear else {name: array}
            for key, value in tensors.items():
                writer.add(key, value)
                types[key] = "W8A8S" if linear else "FLOAT"
            sparse += [name] if linear else []
    copy_side_files(checkpoint, target)
    description = {"model_quant_type": "W8A8S", "version": "1.0.0", "group_size": 0, **types}
    (target / "quant_model_description.json").write_text(json.dumps(description, indent=2))
    (target / "quant_model_description.json").chmod(0o600)
    return sparse


def quantized(name: str, array: np.ndarray, method: str) -> dict[str, np.ndarray]:
    """Return the tensors of one sparse-quantized linear layer."""
    weight = array.astype(np.float32)
    codes = METHODS[method](weight)
    used = codes != 0
    step = np.where(used, weight / np.where(used, codes, 1), np.nan)
    scale = np.nan_to_num(np.nanmedian(step, axis=1)).astype(np.float32)
    stem = name.removesuffix(".weight")
    return {
        name: codes,
        f"{stem}.input_scale": np.array([INPUT_SCALE]),
        f"{stem}.input_offset": np.zeros(1, np.float32),
        f"{stem}.quant_bias": np.zeros(len(codes), np.int32),
        f"{stem}.deq_scale": (INPUT_SCALE * scale).view(np.int32).astype(np.int64),
    }
