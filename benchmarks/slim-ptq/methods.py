"""How far the predictions of the example models move under every weight method and its options.

Defaults are chosen here, so nothing that results are reported on is looked at: calibration is on
the first half of the lines of examples/calib.jsonl, the measure on the second half; for copy-llama,
on other repeated random segments than are reported on.  It is the mean Kullback-Leibler divergence
from the float model in thousandths of a nat a token.  3 bits have no file format; all schemes are
measured by putting the dequantized weights into the model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from _common import save
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slim_core.dtypes import IntType
from slim_core.method import MethodSpec
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.calibration.moments import model_inputs
from slim_ptq.calibration.text import load_tokenizer
from slim_ptq.evaluate import encode_text
from slim_ptq.methods import LayerInputs, make_method
from slim_ptq.methods.grid import WeightGrid

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
MODELS = ("tiny-llama", "copy-llama")
METHODS: dict[str, Any] = {
    "minmax": "minmax",
    "minmax, full range": {"name": "minmax", "full_range": True},
    "clip": "clip",
    "clip, weighted": {"name": "clip", "weighted": True},
    "ssz": "ssz",
    "ssz, weighted": {"name": "ssz", "weighted": True},
    "hqq": "hqq",
    "hqq, float offset": {"name": "hqq", "float_offset": True},
    "hqq, norm and beta of the paper": {"name": "hqq", "norm": 0.7, "beta": 10.0},
    "gptq as in the paper": {
        "name": "gptq",
        "order": "natural",
        "range": "minmax",
        "sweeps": 0,
        "static_groups": False,
        "keep_nearest": False,
    },
    "gptq": "gptq",
    **{f"gptq, {count} sweeps": {"name": "gptq", "sweeps": count} for count in (0, 1, 4, 8)},
    "gptq, no refit": {"name": "gptq", "refit": False},
    **{f"gptq, damp {damp}": {"name": "gptq", "damp": damp} for damp in (0.001, 0.003, 0.03)},
    "gptq, natural order": {"name": "gptq", "order": "natural"},
    "gptq, group order": {"name": "gptq", "order": "group"},
    "gptq, groups in their turn": {"name": "gptq", "order": "group", "static_groups": False},
    "gptq, min-max range": {"name": "gptq", "range": "minmax"},
}
SCHEMES = [
    (4, 0, True),
    (4, 32, True),
    (4, 32, False),
    (3, 32, False),
]
LENGTH = 256
SEGMENTS = 24  # of copy-llama, for each purpose


def main() -> None:
    """Measure and save."""
    rows = [row for model in MODELS for row in rows_of(model)]
    save(
        "methods",
        COMMAND,
        {
            "question": "divergence of the models of examples/ by weight method, on held-out text",
            "tokens": {
                name: [sum(map(torch.numel, part)) for part in halves(name)] for name in MODELS
            },
            "rows": rows,
        },
    )


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the divergence of a model by scheme and method."""
    path = ROOT / "examples" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    seen, held_out = halves(name)
    needs = dict.fromkeys(linears, make_method(MethodSpec("gptq")).needs)
    rows: list[dict[str, Any]] = []
    samples = [[batch] for batch in seen]
    inputs = {
        k: v for part in model_inputs(model, linears, needs, samples) for k, v in part.items()
    }
    exact = likelihoods(model, held_out)
    for bits, group, symmetric in SCHEMES:
        scheme = scheme_of(bits, group, symmetric)
        for label, spec in METHODS.items():
            if label == ("hqq, float offset" if symmetric else "minmax, full range"):
                continue  # no other than without
            method = make_method(MethodSpec.parse(spec))
            started = time.perf_counter()
            for layer, linear in linears.items():
                linear.weight.data = dequantized(method, weights[layer], scheme, inputs[layer])
            seconds = round(time.perf_counter() - started, 2)
            moved = functional.kl_div(
                likelihoods(model, held_out), exact, reduction="sum", log_target=True
            )
            rows.append(
                {
                    "model": name,
                    "scheme": text_of(scheme),
                    "method": label,
                    "divergence": round(1000 * float(moved) / exact.shape[:2].numel(), 3),
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    return rows


def halves(name: str) -> list[tuple[torch.Tensor, ...]]:
    """Return what is calibrated on and what is measured on, in batches of four windows."""
    if name == "copy-llama":
        generator = torch.Generator().manual_seed(2000)
        segments = torch.randint(1, 512, (2, SEGMENTS, LENGTH // 2), generator=generator)
        return [torch.split(torch.cat([half, half], dim=1), 4) for half in segments]
    tokenizer = load_tokenizer(ROOT / "examples" / name)
    lines = (ROOT / "examples" / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    middle = len(lines) // 2
    found = []
    for part in (lines[:middle], lines[middle:]):
        text = "\n".join(json.loads(line)["text"] for line in part)
        ids = encode_text(tokenizer, text)
        found.append(torch.split(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH), 4))
    return found


def likelihoods(model: nn.Module, batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return log likelihoods of every next token, (windows, LENGTH, vocabulary)."""
    with torch.no_grad():
        logits = [model(ids, use_cache=False).logits.float() for ids in batches]
        return torch.log_softmax(torch.cat(logits), dim=-1)


def scheme_of(bits: int, group: int, symmetric: bool) -> TensorScheme:
    """Return a scheme of integer weights."""
    granularity = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    return TensorScheme(IntType(bits), granularity, symmetric, group)


def text_of(scheme: TensorScheme) -> str:
    """Return a short name of a scheme."""
    group = f"_g{scheme.group_size}" if scheme.group_size else ""
    return f"w{scheme.dtype.bits}{group}" + ("" if scheme.symmetric else "_asym")


def dequantized(
    method: Any, weight: torch.Tensor, scheme: TensorScheme, inputs: LayerInputs
) -> torch.Tensor:
    """Return the weight that the codes of a method stand for."""
    parts = method.quantize("", weight, scheme, inputs)
    return WeightGrid(scheme, parts.scale, parts.offset).values(parts.codes)


if __name__ == "__main__":
    main()
