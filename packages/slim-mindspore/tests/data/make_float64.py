"""Write ``slim_ptq_float64.npz``: what slim-ptq computes in float64 from its own checkpoints.

In an environment of slim-ptq, from the root of the repository::

    python packages/slim-mindspore/tests/data/make_float64.py
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slim_core.checkpoint import open_checkpoint
from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows

DATA = Path(__file__).parent
MODEL = DATA.parents[3] / "examples" / "tiny-llama"
RECIPES = {
    "w8a8": {"scheme": "w8a8", "observer": "minmax"},
    "w8a8_dynamic": {"scheme": "w8a8_dynamic"},
    "w8a16": {"scheme": "w8a16"},
    "w4a16_g32": {"scheme": "w4a16_g32", "method": "minmax"},
    "w8a16_c8": {"scheme": "w8a16", "kv_cache": {"after_rotary": True}},
    "w8a16_c8_early": {"scheme": "w8a16", "kv_cache": {}},  # keys before the rotary embedding
}
COLUMNS = (0, 700, 1400, 2047)


class Float64(TorchFunctionMode):
    """Does in float64 what the code of transformers asks to do in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {key: widened(value) for key, value in (kwargs or {}).items()}
        return func(*(widened(value) for value in args), **kwargs)


def widened(value):
    return torch.float64 if value is torch.float32 else value


def logits_of(directory, ids):
    model = load_model(directory, dtype="float64")
    with torch.no_grad(), Float64():
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        logits = model(torch.from_numpy(ids.astype(np.int64))).logits
    assert logits.dtype == torch.float64
    return logits.numpy()


def main():
    with np.load(DATA / "slim_ptq_w8a8.npz") as stored:
        ids, calib = stored["ids"], stored["calib"]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2048, 2))
    arrays = {"ids": ids, "calib": calib, "columns": np.array(COLUMNS), "signs": signs.astype("i1")}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            windows = TokenWindows((torch.from_numpy(calib.astype(np.int64)),), "six windows")
            quantize(MODEL, out, recipe=Recipe.build(**recipe), calibration=windows)
            logits = logits_of(out, ids)
            checkpoint = open_checkpoint(out)
            tensors = {tensor: checkpoint.load(tensor) for tensor in checkpoint.tensors}
        arrays[f"{name}|logits"] = np.concatenate([logits[..., COLUMNS], logits @ signs], axis=-1)
        arrays[f"{name}|names"] = np.array(list(tensors))
        arrays[f"{name}|sha256"] = np.array([digest(tensor) for tensor in tensors.values()])
        for tensor, scale in tensors.items():
            if tensor.endswith("kv_cache_scale"):
                arrays[f"{name}|{tensor}"] = scale
        print(name, logits.shape, float(np.abs(logits).max()))
    np.savez_compressed(DATA / "slim_ptq_float64.npz", **arrays)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    main()
