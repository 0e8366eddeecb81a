"""What slim-ptq makes of the example model, and its logits in float32 and float64: step 1.

In an environment of slim-ptq, from the root of the repository::

    python benchmarks/slim-mindspore/agreement/write.py FOLDER

``FOLDER`` gets a checkpoint for each scheme and ``<scheme>.npz`` beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "tiny-llama"
TOKENS = ROOT / "packages" / "slim-mindspore" / "tests" / "data" / "slim_ptq_w8a8.npz"
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8", "observer": "minmax"},
    "w8a8_dynamic": {"scheme": "w8a8_dynamic"},
    "w8a16": {"scheme": "w8a16"},
    "w4a16_g32": {"scheme": "w4a16_g32", "method": "minmax"},
    "w8a16_c8": {"scheme": "w8a16", "kv_cache": {"after_rotary": True}},
    "w8a16_c8_early": {"scheme": "w8a16", "kv_cache": {}},  # keys before the rotary embedding
}


class Float64(TorchFunctionMode):
    """Does in float64 what the code of transformers asks to do in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(_widened(value) for value in args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def logits_in_float64(directory: Path, ids: torch.Tensor) -> np.ndarray:
    """Return logits of which nothing was computed in float32."""
    model = load_model(directory, dtype="float64")
    with torch.no_grad(), Float64():
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        logits: torch.Tensor = model(ids).logits
    return logits.numpy()


def main() -> None:
    """Write all schemes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True, parents=True)
    with np.load(TOKENS) as stored:
        ids, calib = (torch.from_numpy(stored[name].astype(np.int64)) for name in ("ids", "calib"))
    for name, recipe in RECIPES.items():
        windows = TokenWindows((calib,), "six windows")
        quantize(MODEL, folder / name, recipe=Recipe.build(**recipe), calibration=windows)
        exact = logits_in_float64(folder / name, ids)
        with torch.no_grad():
            single = load_model(folder / name)(ids).logits.numpy()
        np.savez(folder / f"{name}.npz", float64=exact, float32=single, ids=ids, calib=calib)
        print(f"{name:16s} {exact.dtype} {single.dtype} {exact.shape}", flush=True)


if __name__ == "__main__":
    main()
