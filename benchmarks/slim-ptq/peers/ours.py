"""The same cases with slim-ptq: through a checkpoint on disk where a format holds the scheme."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import Scheme
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.dtypes import IntType
from slim_core.method import MethodSpec
from slim_core.recipe import Recipe
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq import quantize
from slim_ptq.calibration.moments import model_inputs
from slim_ptq.load import load_model
from slim_ptq.methods import make_method
from slim_ptq.methods.grid import WeightGrid

FIRST = {
    "awq": {"smooth": "awq"},
    "smoothquant": {"smooth": "smoothquant"},
    "rotation": {"rotate": {}},
}


def quantized(model: Path, calibration: Path, scheme: Scheme, method: str) -> Any:
    """Return a model that computes what an engine would."""
    ids = load_file(calibration)["ids"]
    if scheme.bits == 3:
        return _without_format(model, ids, scheme, method)
    *first, last = method.split("+")
    values: dict[str, Any] = {"scheme": scheme.name, "method": _spec(last, scheme)}
    for part in first:
        values |= FIRST[part]
    if last == "flatquant":
        values["scheme"] = "w4a4_flatquant_dynamic"
    with tempfile.TemporaryDirectory() as folder:
        texts, out = Path(folder) / "ids.jsonl", Path(folder) / "out"
        texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        recipe = Recipe.build(**values)
        count, length = ids.shape
        quantize(model, out, recipe=recipe, calibration=texts, samples=count, length=length)
        return load_model(out)


def _spec(method: str, scheme: Scheme) -> Any:
    """Return a method as recipes name it; zero points of HQQ are fractions, as in its peer."""
    if method == "hqq" and not scheme.symmetric:
        return {"name": "hqq", "float_offset": True}
    return method


def _without_format(model: Path, ids: torch.Tensor, scheme: Scheme, method: str) -> Any:
    """Put the weights that the codes stand for into the float model."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    linears = {
        name: module
        for name, module in loaded.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    maker = make_method(MethodSpec.parse(_spec(method, scheme)))
    needs = dict.fromkeys(linears, maker.needs)
    found = model_inputs(loaded, linears, needs, [[batch] for batch in torch.split(ids, 4)])
    inputs = {name: item for part in found for name, item in part.items()}
    granularity = Granularity.PER_GROUP if scheme.group else Granularity.PER_CHANNEL
    kind = TensorScheme(IntType(scheme.bits), granularity, scheme.symmetric, scheme.group)
    for name, linear in linears.items():
        parts = maker.quantize(name, linear.weight, kind, inputs.get(name))
        linear.weight.data = WeightGrid(kind, parts.scale, parts.offset).values(parts.codes)
    return loaded
