"""Perplexity with an int8 key-value cache and with int8 attention, beside each type of weights.

The cache is emulated where its scales are measured, at the outputs of the key and value layers.
vllm-ascend rounds keys after the rotary embedding, where ``after_rotary`` measures and emulates
them; a last row shows what scales that were measured before it cost there.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import save

from slim_core.dtypes import INT8
from slim_core.numerics import dequantize, quantize
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_ptq import evaluate_text, load_model
from slim_ptq import quantize as quantize_model
from slim_ptq.attention import FAQuantizer, reachable_attention
from slim_ptq.attention.hooking import hook
from slim_ptq.calibration.text import load_tokenizer
from slim_ptq.evaluate import encode_text, perplexity, read_text

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
CALIB = ROOT / "examples" / "calib.jsonl"
TEXTS = [
    ROOT / "examples" / "eval.txt",
    ROOT.parent / "shared" / "data" / "public_domain_test.txt",
]
WINDOW = 512
EXTRAS: dict[str, dict[str, Any]] = {
    "float": {},
    "C8": {"kv_cache": {"symmetric": True}},
    "C8, asymmetric": {"kv_cache": {"symmetric": False}},
    "C8 after RoPE": {"kv_cache": {"after_rotary": True}},
    "FAQuant": {"attention": {}},
}
# model -> its types of weights, and what is done with each; attention of Bloom has no hook
CASES = {
    "tiny-llama": (("float", "w8a16", "w8a8"), tuple(EXTRAS)),
    "tiny-bloom": (("float", "w8a8"), ("float", "C8")),
}


class RotatedKeys(FAQuantizer):
    """Rounds keys, after the rotary embedding, and values with the scales of their channels."""

    def __init__(self, config: Any, scales: dict[str, torch.Tensor]) -> None:
        super().__init__(config, logging.getLogger("bench"))
        self.scales = scales

    def quant(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Return keys and values as the cache holds them."""
        if qkv == "q":
            return states
        scale = self.scales[qkv].reshape(states.shape[1], 1, states.shape[3])
        rounded: torch.Tensor = dequantize(quantize(states, scale, None, INT8), scale, None)
        return rounded


def after_rotary(directory: Path, texts: list[Path]) -> dict[str, float]:
    """Return the perplexities of the float model with a symmetric cache rounded after RoPE."""
    stored = QuantizedCheckpoint(directory)
    model = load_model(ROOT / "examples" / "tiny-llama")
    for name in reachable_attention(model, [""]):
        scales = {
            part: torch.from_numpy(stored.checkpoint.load(f"{name}.{part}_proj.kv_cache_scale"))
            for part in "kv"
        }
        attention = model.get_submodule(name)
        hook(attention, RotatedKeys(attention.config, scales))
    tokenizer = load_tokenizer(ROOT / "examples" / "tiny-llama")
    return {
        text.name: perplexity(model, encode_text(tokenizer, read_text(text)), window=WINDOW).value
        for text in texts
    }


def main() -> None:
    """Measure and save."""
    texts = [text for text in TEXTS if text.exists()]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, (schemes, extras) in CASES.items():
            source = ROOT / "examples" / model
            before = {text.name: evaluate_text(source, text, window=WINDOW).value for text in texts}
            rows.append(_row(model, "float", "float", before, before))
            for scheme, extra in itertools.product(schemes, extras):
                if scheme == extra == "float":
                    continue
                out = Path(folder) / f"{model}{scheme}{extra}"
                recipe = Recipe.build(scheme=scheme, **EXTRAS[extra])
                quantize_model(source, out, recipe=recipe, calibration=CALIB)
                found = {text.name: evaluate_text(out, text, window=WINDOW).value for text in texts}
                rows.append(_row(model, scheme, extra, found, before))
        rotated = after_rotary(Path(folder) / "tiny-llamafloatC8", texts)
    first = {text.name: rows[0][text.name] for text in texts}
    rows.append(_row("tiny-llama", "float", "C8 after RoPE, scales of before it", rotated, first))
    save(
        "kv_cache",
        COMMAND,
        {
            "question": "perplexity with int8 caches (C8) and int8 attention (FAQuant), "
            f"windows of {WINDOW} tokens",
            "rows": rows,
        },
    )


def _row(
    model: str, scheme: str, extra: str, found: dict[str, float], before: dict[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "weights": scheme, "cache and attention": extra}
    for name, value in found.items():
        row[name] = round(value, 4)
        row[f"{name}, change"] = f"{100 * (value / before[name] - 1):+.2f} %"
    return row


if __name__ == "__main__":
    main()
