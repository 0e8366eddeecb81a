"""Perplexity with and without each method of outlier suppression, for four schemes.

On the trained models of examples/, and on the language model with outliers planted in it, which
leave its float outputs as they are: channels that norms multiply by 64 and their readers divide,
and the same between linear layers.  Text: held-out text beside the repository where that is
present, else that of examples/, which the model wrote itself.

Writes ``results/suppression.json`` and the tables of the documentation.  Names of cases as
arguments measure these alone and keep the tables of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, save
from _models import GENERATED, HELD_OUT, WINDOW, Case, copy_case, text_case
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.recipe import Recipe
from slim_ptq import load_model, quantize

COMMAND = "nox -s bench-slim-ptq"
PAGE = Path(__file__).parents[2] / "packages" / "slim-ptq" / "docs" / "outlier-suppression.md"
BEGIN, END = "<!-- tables of suppression.py -->", "<!-- end -->"
TEXT = HELD_OUT if HELD_OUT.exists() else GENERATED
CALIBRATION, EVALUATION = 8, 16  # windows
PLANTED = "tiny-llama, outliers planted"
SCHEMES = ("w8a8", "w8a8_dynamic", "w8a8s", "w4a16")
METHODS: dict[str, Any] = {
    "none": None,
    "m1 smoothquant": "smoothquant",
    "m2 threshold": "threshold",
    "awq": "awq",
    "awq, norms": {"method": "awq", "links": ["norm->linear"]},
    "m4 iterative": "iterative",
    "m4 iterative, shift": {"method": "iterative", "shift": True},
    "m5 cbq": "cbq",
    "m6 flex": "flex",
    "do_smooth alpha_search": "alpha_search",
}
FACTOR = 64.0  # a power of two, so that planting is exact


def main() -> None:
    """Measure and save."""
    with tempfile.TemporaryDirectory() as folder:
        known = cases(Path(folder))
        tables = earlier() if sys.argv[1:] else {}
        for name in sys.argv[1:] or known:
            case = known[name]()
            rows = [
                {"method": method} | {scheme: run(case, scheme, smooth) for scheme in SCHEMES}
                for method, smooth in METHODS.items()
            ]
            tables[name] = {"float": round(case.score(load_model(case.directory)), 3), "rows": rows}
            report(tables)  # of every case that is done, since all take many minutes


def earlier() -> dict[str, Any]:
    """Return the tables of the last run."""
    file = RESULTS / "suppression.json"
    tables: dict[str, Any] = json.loads(file.read_text())["tables"] if file.exists() else {}
    return tables


def report(tables: dict[str, Any]) -> None:
    """Save the tables so far, and write them into the page of the documentation."""
    result = {
        "question": "perplexity after each method of outlier suppression, lower is better",
        "text": f"{TEXT.name}, {EVALUATION} windows of {WINDOW} tokens; "
        "of copy-llama the second halves of repeated random sequences",
        "calibration": f"{CALIBRATION} windows of {WINDOW} tokens",
        "tables": tables,
    }
    save("suppression", COMMAND, result)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{written(tables)}{END}{after}", encoding="utf-8")


def written(tables: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    lines = []
    for name, table in tables.items():
        lines += [
            f"\n{name}, float {table['float']}:\n",
            f"| method | {' | '.join(SCHEMES)} |",
            "|---" * (1 + len(SCHEMES)) + "|",
            *(f"| {' | '.join(str(value) for value in row.values())} |" for row in table["rows"]),
        ]
    return "\n".join([*lines, "", ""])


def run(case: Case, scheme: str, smooth: Any) -> float:
    """Return the perplexity of a model quantized by a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        recipe = Recipe.build(scheme=scheme, smooth=smooth)
        quantize(case.directory, out, recipe=recipe, calibration=case.calibration)
        return round(case.score(load_model(out)), 3)


def cases(folder: Path) -> dict[str, Callable[[], Case]]:
    """Return what makes each case, by its name."""
    return {
        "tiny-llama": functools.partial(text, "tiny-llama"),
        "tiny-bloom": functools.partial(text, "tiny-bloom"),
        "copy-llama": functools.partial(copy_case, samples=CALIBRATION, length=WINDOW),
        PLANTED: functools.partial(planted, folder / "planted"),
    }


def text(name: str) -> Case:
    """Return a language model of examples/."""
    return text_case(name, samples=CALIBRATION, length=WINDOW, text=TEXT, windows=EVALUATION)


def planted(directory: Path) -> Case:
    """Return the language model with outliers planted."""
    case = text("tiny-llama")
    plant(case.directory, directory)
    return dataclasses.replace(case, name=PLANTED, directory=directory)


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
