"""Quantize with another tool and save the float weights that its codes stand for.

Runs in an environment of its own for each tool, since these exclude each other, and knows nothing
of slim: ``python worker.py TOOL WORK`` reads ``WORK/TOOL.json``, a list of cases, and writes
``WORK/out/CASE.safetensors`` for each.  A layer of which the tool quantizes the inputs too is named
in the metadata of the file with the bits and, where it is static, the range of its input.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Inputs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What to quantize and how, as :mod:`cases` wrote it down."""

    name: str
    model: str  # a directory
    calibration: str  # a safetensors file with `ids`, int64, (rows, tokens)
    method: str
    bits: int
    group: int  # 0: a scale for each output channel
    symmetric: bool
    activation: str  # none, token (symmetric) or tensor (asymmetric, static)
    seed: int

    @property
    def ids(self) -> torch.Tensor:
        """Tokens to calibrate on."""
        return load_file(self.calibration)["ids"]

    def load(self) -> Any:
        """Return the float model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


def parameters(model: torch.nn.Module) -> Weights:
    """Return the parameters of a model, those that are tied once."""
    return {k: v.detach().float().contiguous().clone() for k, v in model.named_parameters()}


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the layers that every tool quantizes: all but the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }


def hqq(case: Case) -> tuple[Weights, Inputs]:
    """HQQ, ``Quantizer`` with groups along the inputs; its zero points are fractions."""
    from hqq.core.quantize import Quantizer

    model = case.load()
    found = parameters(model)
    for name, module in linears(model).items():
        codes, meta = Quantizer.quantize(
            module.weight.data,
            nbits=case.bits,
            group_size=case.group or module.weight.shape[1],
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        values = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
        found[f"{name}.weight"] = values.float().contiguous()
    return found, {}


def quanto(case: Case) -> tuple[Weights, Inputs]:
    """Min-max of optimum-quanto; below 8 bits its offsets are fractions."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    qtype = {2: qint2, 4: qint4, 8: qint8}[case.bits]
    model = case.load()
    found = parameters(model)
    for name, module in linears(model).items():
        weight = module.weight.data
        if case.bits == 8:
            scale = AbsmaxOptimizer()(weight, qtype, axis=0)
            values = quantize_weight(weight, qtype, 0, scale, optimized=False)
        else:
            group = case.group or weight.shape[1]
            scale, shift = MaxOptimizer()(weight, qtype, 0, group)
            values = quantize_weight(weight, qtype, 0, scale, shift, group, optimized=False)
        found[f"{name}.weight"] = values.dequantize().float().contiguous()
    return found, {}


def auto_round(case: Case) -> tuple[Weights, Inputs]:
    """AutoRound with its defaults: 200 steps on batches of 8 windows."""
    from auto_round import AutoRound

    ids = case.ids
    tuner = AutoRound(
        case.load(),
        _tokenizer(case),
        bits=case.bits,
        group_size=case.group or -1,
        sym=case.symmetric,
        dataset=[row[None] for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        seed=case.seed,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        disable_model_free=True,
    )
    model, _ = tuner.quantize()
    return parameters(model), {}


def gptqmodel(case: Case) -> tuple[Weights, Inputs]:
    """GPTQ of GPTQModel; its scales are kept in float16."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # on two cores its default is too few
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    by_activation = "act-order" in case.method
    config = QuantizeConfig(
        format="gptq_v2",  # zero points as they are: the first version stores them less one
        bits=case.bits,
        group_size=case.group or -1,
        sym=case.symmetric,
        desc_act=by_activation,
        act_group_aware=bool(case.group) and not by_activation,  # its default, where it can
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(case.model, config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in case.ids]
    model.quantize(rows, batch_size=4)
    inner = model.model
    found = {k: v.detach().float().contiguous() for k, v in inner.named_parameters()}
    for name, module in inner.named_modules():
        if hasattr(module, "dequantize_weight"):
            found[f"{name}.weight"] = module.dequantize_weight().T.float().contiguous()
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias.detach().float().contiguous()
    return {k: v for k, v in found.items() if not k.endswith(("qweight", "qzeros"))}, {}


def llmcompressor(case: Case) -> tuple[Weights, Inputs]:
    """RTN, GPTQ, AWQ, SmoothQuant and rotations of llm-compressor."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if not torch.accelerator.is_available():  # AWQ pins memory, which only an accelerator has
        torch.Tensor.pin_memory = lambda self, device=None: self
    ids = case.ids
    model = case.load()
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    parts = case.method.split("+")
    firsts = {
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.8),
        "awq": AWQModifier,
        "rotation": lambda: SpinQuantModifier(rotations=["R1", "R2"]),
    }
    last = GPTQModifier if parts[-1] == "gptq" else QuantizationModifier
    recipe = [firsts[part]() for part in parts if part in firsts]
    recipe.append(last(config_groups={"group_0": _llm_scheme(case)}, ignore=["lm_head"]))
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    found = parameters(model)
    inputs: Inputs = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        values = fake_quantize(
            module.weight,
            module.weight_scale,
            module.weight_zero_point,
            scheme.weights,
            getattr(module, "weight_g_idx", None),
        )
        found[f"{name}.weight"] = values.detach().float().contiguous()
        if scheme.input_activations is not None:
            inputs[name] = {"bits": scheme.input_activations.num_bits}
            if case.activation == "tensor":
                inputs[name]["scale"] = float(module.input_scale)
                inputs[name]["zero"] = float(module.input_zero_point)
    drop = ("_scale", "_zero_point", "_g_idx")
    return {k: v for k, v in found.items() if not k.endswith(drop)}, inputs


def _llm_scheme(case: Case) -> dict[str, Any]:
    scheme: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": case.bits,
            "type": "int",
            "symmetric": case.symmetric,
            "strategy": "group" if case.group else "channel",
            "group_size": case.group or None,
        },
    }
    if case.activation != "none":
        token = case.activation == "token"
        scheme["input_activations"] = {
            "num_bits": case.bits,
            "type": "int",
            "symmetric": token,
            "strategy": "token" if token else "tensor",
            "dynamic": token,
        }
    return scheme


def _tokenizer(case: Case) -> Any:
    from transformers import AutoTokenizer

    has = (Path(case.model) / "tokenizer.json").exists()
    return AutoTokenizer.from_pretrained(case.model) if has else None


TOOLS: dict[str, Callable[[Case], tuple[Weights, Inputs]]] = {
    "hqq": hqq,
    "optimum-quanto": quanto,
    "auto-round": auto_round,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
}


def main() -> None:
    """Quantize all cases of a tool that are not there yet; one that fails says why in its place."""
    tool, work = sys.argv[1], Path(sys.argv[2])
    out = work / "out"
    out.mkdir(exist_ok=True)
    (work / f"{tool}.version").write_text(importlib.metadata.version(tool))
    for values in json.loads((work / f"{tool}.json").read_text()):
        case = Case(**values)
        target = out / f"{case.name}.safetensors"
        if target.exists():
            continue
        torch.manual_seed(case.seed)
        started = time.perf_counter()
        try:
            weights, inputs = TOOLS[tool](case)
        except Exception as error:
            traceback.print_exc()
            (out / f"{case.name}.error").write_text(f"{type(error).__name__}: {error}")
            continue
        seconds = time.perf_counter() - started
        notes = {"inputs": json.dumps(inputs), "seconds": f"{seconds:.2f}"}
        part = target.with_suffix(".part")
        save_file(weights, part, metadata=notes)
        part.rename(target)
        print(f"{case.name}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
