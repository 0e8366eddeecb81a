"""Perplexity of the example model under every weight method.

Perplexity is that of held-out text beside the repository, where that is present, and of the text of
examples/, which the model wrote itself.  Schemes of 2 and 3 bits have no file format; they are
measured by putting the dequantized weights into the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _common import save
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.dtypes import IntType
from slim_core.method import MethodSpec
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.calibration.moments import model_inputs
from slim_ptq.calibration.text import load_tokenizer, read_calibration
from slim_ptq.evaluate import encode_text, perplexity, read_text
from slim_ptq.methods import LayerInputs, make_method
from slim_ptq.methods.grid import WeightGrid

COMMAND = "nox -s bench-slim-ptq"
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
TEXTS = [
    ROOT / "examples" / "eval.txt",
    ROOT.parent / "shared" / "data" / "public_domain_test.txt",
]
METHODS: dict[str, Any] = {
    "minmax": "minmax",
    "clip": "clip",
    "clip, weighted": {"name": "clip", "weighted": True},
    "ssz": "ssz",
    "ssz, weighted": {"name": "ssz", "weighted": True},
    "hqq": "hqq",
    "hqq, float offset": {"name": "hqq", "float_offset": True},
    "gptq as in the paper": {
        "name": "gptq",
        "order": "natural",
        "range": "minmax",
        "sweeps": 0,
        "static_groups": False,
    },
    "gptq without sweeps": {"name": "gptq", "sweeps": 0},
    "gptq": "gptq",
    "signround": "signround",
}
SCHEMES = [
    (4, 0, True),
    (4, 32, False),
    (3, 0, True),
    (2, 32, False),
]
WINDOWS = 8  # of 512 tokens, of each text: the differences are between the same windows


def main() -> None:
    """Measure and save."""
    texts = [text for text in TEXTS if text.exists()]
    tokenizer = load_tokenizer(MODEL)
    tokens = {text.name: encode_text(tokenizer, read_text(text))[: WINDOWS * 512] for text in texts}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    data = read_calibration(ROOT / "examples" / "calib.jsonl", MODEL)
    needs = dict.fromkeys(linears, make_method(MethodSpec("gptq")).needs)
    samples = [[batch] for batch in data.batches]
    inputs = {
        k: v for part in model_inputs(model, linears, needs, samples) for k, v in part.items()
    }

    def measured() -> dict[str, float]:
        return {name: round(perplexity(model, ids).value, 3) for name, ids in tokens.items()}

    exact = measured()
    rows = []
    for bits, group, symmetric in SCHEMES:
        scheme = scheme_of(bits, group, symmetric)
        for label, spec in METHODS.items():
            if symmetric and label == "hqq, float offset":
                continue
            method = make_method(MethodSpec.parse(spec))
            for name, linear in linears.items():
                linear.weight.data = dequantized(method, weights[name], scheme, inputs[name])
            rows.append({"scheme": text_of(scheme), "method": label, **measured()})
            print(rows[-1], flush=True)
    save(
        "methods",
        COMMAND,
        {
            "question": "perplexity of examples/tiny-llama by weight method, windows of 512 tokens",
            "calibration": data.to_dict(),
            "float": exact,
            "rows": rows,
        },
    )


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
