"""Perplexity with and without each method of outlier suppression, for four schemes.

On the trained models of examples/, and on the language model with outliers planted in it, which
leave its float outputs as they are: channels that norms multiply by 64 and their readers divide,
and the same between linear layers.  Text: held-out text beside the repository where that is
present, else that of examples/, which the model wrote itself.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows, read_calibration
from slim_ptq.evaluate import encode_text, perplexity

COMMAND = "nox -s bench-slim-ptq"
EXAMPLES = Path(__file__).parents[2] / "examples"
HELD_OUT = EXAMPLES.parents[1] / "shared" / "data" / "public_domain_test.txt"
WINDOW, CALIBRATION, EVALUATION = 512, 8, 16  # tokens, windows, windows
SCHEMES = ("w8a8", "w8a8_dynamic", "w8a8s", "w4a16")
METHODS: dict[str, Any] = {
    "none": None,
    "m1 smoothquant": "smoothquant",
    "m2 threshold": "threshold",
    "m3 awq": "awq",
    "m3 awq, all links": {
        "method": "awq",
        "links": ["norm->linear", "v->o", "up->down"],
    },
    "m4 iterative": "iterative",
    "m4 iterative, shift": {"method": "iterative", "shift": True},
    "m5 cbq": "cbq",
    "m6 flex": "flex",
    "do_smooth alpha_search": "alpha_search",
}
FACTOR = 64.0  # a power of two, so that planting is exact

Score = Callable[[Any], float]


def main() -> None:
    """Measure and save."""
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model, data, score in cases(Path(folder)):
            rows = [
                {"method": method} | {s: run(model, data, score, s, smooth) for s in SCHEMES}
                for method, smooth in METHODS.items()
            ]
            tables[name] = {"float": round(score(load_model(model)), 3), "rows": rows}
            report(tables)  # of every case that is done, since all take many minutes


def report(tables: dict[str, Any]) -> None:
    """Save the tables so far."""
    save(
        "suppression",
        COMMAND,
        {
            "question": "perplexity after each method of outlier suppression, lower is better",
            "text": f"{HELD_OUT.name if HELD_OUT.exists() else 'eval.txt'}, {EVALUATION} windows "
            f"of {WINDOW} tokens; of copy-llama the second halves of repeated random sequences",
            "calibration": f"{CALIBRATION} windows of {WINDOW} tokens",
            "tables": tables,
        },
    )


def run(model: Path, data: TokenWindows, score: Score, scheme: str, smooth: Any) -> float:
    """Return the perplexity of a model quantized by a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantize(model, out, recipe=Recipe.build(scheme=scheme, smooth=smooth), calibration=data)
        return round(score(load_model(out)), 3)


def cases(folder: Path) -> Iterator[tuple[str, Path, TokenWindows, Score]]:
    """Yield names, model directories, calibration data, and what measures a model."""
    for name in ("tiny-llama", "tiny-bloom"):
        yield name, EXAMPLES / name, text_data(EXAMPLES / name), text_score(EXAMPLES / name)
    yield "copy-llama", EXAMPLES / "copy-llama", repeated(CALIBRATION, seed=0), copy_score
    planted = folder / "planted"
    plant(EXAMPLES / "tiny-llama", planted)
    source = EXAMPLES / "tiny-llama"
    yield "tiny-llama, outliers planted", planted, text_data(source), text_score(source)


def text_data(model: Path) -> TokenWindows:
    """Return calibration windows of the text that the example model wrote."""
    return read_calibration(EXAMPLES / "calib.jsonl", model, samples=CALIBRATION, length=WINDOW)


def text_score(model: Path) -> Score:
    """Return the function that measures perplexity on text."""
    text = HELD_OUT if HELD_OUT.exists() else EXAMPLES / "eval.txt"
    ids = tokens_of(model, text)[: EVALUATION * WINDOW]
    return lambda loaded: perplexity(loaded, ids, window=WINDOW).value


def tokens_of(model: Path, text: Path) -> torch.Tensor:
    """Return the token ids of a file."""
    return encode_text(AutoTokenizer.from_pretrained(model), text.read_text(encoding="utf-8"))


def repeated(rows: int, seed: int) -> TokenWindows:
    """Return sequences of random tokens that are repeated once, as copy-llama was trained on."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1, 512, (rows, WINDOW // 2), generator=generator)
    return TokenWindows(tuple(torch.cat([half, half], 1).split(4)), "repeated sequences")


def copy_score(model: Any) -> float:
    """Return the perplexity of the second halves of repeated sequences."""
    losses = []
    for ids in repeated(EVALUATION // 2, seed=1).batches:
        with torch.no_grad():
            logits = model(ids).logits.float()[:, WINDOW // 2 : -1]
        wanted = ids[:, WINDOW // 2 + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted))
    return math.exp(float(torch.stack(losses).mean()))


def plant(source: Path, target: Path) -> None:
    """Save a Llama with outlier channels that leave its outputs as they are."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = [attention.q_proj, attention.k_proj, attention.v_proj]
            _scale(layer.input_layernorm, readers, _some(128, generator))
            readers = [mlp.gate_proj, mlp.up_proj]
            _scale(layer.post_attention_layernorm, readers, _some(128, generator))
            _scale(mlp.up_proj, [mlp.down_proj], _some(mlp.up_proj.out_features, generator))
            _plant_values(attention, _some(attention.v_proj.out_features, generator))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _some(channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(channels, generator=generator)[:3]


def _scale(source: torch.nn.Module, readers: list[torch.nn.Linear], channels: torch.Tensor) -> None:
    source.weight[channels] *= FACTOR
    for reader in readers:
        reader.weight[:, channels] /= FACTOR


def _plant_values(attention: Any, channels: torch.Tensor) -> None:
    """Scale value channels; each is read by all query heads of its group."""
    size, groups = attention.head_dim, attention.num_key_value_groups
    attention.v_proj.weight[channels] *= FACTOR
    for channel in channels.tolist():
        head, inner = divmod(channel, size)
        for query in range(head * groups, (head + 1) * groups):
            attention.o_proj.weight[:, query * size + inner] /= FACTOR


if __name__ == "__main__":
    main()
