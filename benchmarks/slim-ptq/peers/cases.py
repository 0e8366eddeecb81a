"""What is compared: models, schemes, the methods of every tool, and calibration by seed."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from slim_ptq.calibration.text import load_tokenizer
from slim_ptq.evaluate import encode_text, read_text

EXAMPLES = Path(__file__).parents[3] / "examples"
MODELS = ("tiny-llama", "tiny-bloom", "copy-llama")
SEEDS = (0, 1, 2)
ROWS, LENGTH = 24, 256  # calibration windows
SCORED = 38  # windows of 512 tokens that are scored: all of examples/eval.txt
OURS = "slim-ptq"
TOOLS = ("llmcompressor", "gptqmodel", "auto-round", "hqq", "optimum-quanto")


@dataclass(frozen=True)
class Scheme:
    """A number format, under the name that slim-ptq has for it or would have."""

    name: str
    bits: int
    group: int = 0
    symmetric: bool = True
    activation: str = "none"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a16", 8),
        Scheme("w4a16", 4),
        Scheme("w4a16_g128", 4, 128),
        Scheme("w4a16_g32", 4, 32),
        Scheme("w4a16_g32_asym", 4, 32, False),
        Scheme("w3a16_g32_asym", 3, 32, False),
        Scheme("w8a8_dynamic", 8, 0, True, "token"),
        Scheme("w8a8", 8, 0, True, "tensor"),
        Scheme("w4a4_dynamic", 4, 0, True, "token"),
    )
}
# Methods that see no calibration data give the same for every seed.
FREE = frozenset({"minmax", "hqq", "ssz", "clip"})


def methods(tool: str, model: str, scheme: Scheme) -> list[str]:
    """Return the methods of a tool for a scheme; none where it cannot make it."""
    if scheme.group == 128 and model == "tiny-llama":
        return []  # its 352 channels are no multiple of 128
    weight_only = scheme.activation == "none"
    if tool == OURS:
        return _ours(model, scheme)
    if tool == "llmcompressor":
        if weight_only:
            return ["minmax", "gptq", *(["awq+minmax"] if scheme.bits < 8 else [])]
        found = ["minmax", "gptq", "smoothquant+minmax", "smoothquant+gptq"]
        llama_4 = scheme.bits == 4 and "llama" in model
        return found + (["rotation+gptq"] if llama_4 else [])
    if not weight_only:
        return []
    if tool == "gptqmodel":
        return ["gptq", "gptq act-order"]
    if tool == "auto-round":  # its copy of ALiBi does not fit that of today's transformers
        return [] if model == "tiny-bloom" else ["signround"]
    if tool == "hqq":
        return [] if scheme.symmetric else ["hqq"]
    if tool == "optimum-quanto":
        is_int8 = scheme.bits == 8 and scheme.symmetric
        return ["minmax"] if is_int8 or (scheme.bits == 4 and not scheme.symmetric) else []
    raise KeyError(tool)


def _ours(model: str, scheme: Scheme) -> list[str]:
    if scheme.activation != "none":
        found = ["minmax", "gptq", "smoothquant+minmax", "smoothquant+gptq"]
        llama_4 = scheme.bits == 4 and "llama" in model  # Bloom has a norm too many to rotate
        return found + (["rotation+gptq", "flatquant"] if llama_4 else [])
    found = ["minmax", "gptq"]
    return found + ([] if scheme.bits == 8 else ["hqq", "awq+minmax", "awq+gptq", "signround"])


def zero_bits(tool: str, method: str, scheme: Scheme) -> int:
    """Return how many bits a zero point takes: a fraction those of a scale."""
    if scheme.symmetric:
        return 0
    return 16 if tool == "optimum-quanto" or method == "hqq" else scheme.bits


@functools.cache
def bits_per_weight(model: Path, tool: str, method: str, scheme: Scheme) -> float:
    """Return the bits of a weight with its share of a 16-bit scale and of a zero point."""
    shapes = [
        (module.out_features, module.in_features)
        for name, module in AutoModelForCausalLM.from_pretrained(model).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    sets = sum(rows * (columns // (scheme.group or columns)) for rows, columns in shapes)
    weights = sum(rows * columns for rows, columns in shapes)
    return scheme.bits + sets * (16 + zero_bits(tool, method, scheme)) / weights


def write_models(work: Path) -> None:
    """Write the models in float32, and what each of them is calibrated on."""
    for name in MODELS:
        if (work / name / "config.json").exists():
            continue
        source = EXAMPLES / name
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(
            work / name
        )
        copy_tokenizer(work / name)
        for seed in SEEDS:
            save_file({"ids": calibration(name, seed)}, calibration_file(work, name, seed))


def copy_tokenizer(directory: Path) -> None:
    """Give a model a tokenizer, which some tools ask for although they are given token ids."""
    own = EXAMPLES / directory.name / "tokenizer.json"
    source = own.parent if own.exists() else EXAMPLES / "tiny-llama"
    for file in source.glob("token*"):
        shutil.copy(file, directory)


def calibration_file(work: Path, model: str, seed: int) -> Path:
    """Return where the calibration tokens of a seed are."""
    return work / f"calib-{model}-{seed}.safetensors"


def calibration(model: str, seed: int) -> torch.Tensor:
    """Return calibration tokens, (ROWS, LENGTH): half of the texts, another half for each seed."""
    generator = torch.Generator().manual_seed(seed)
    if model == "copy-llama":
        return copies(ROWS, LENGTH, generator)
    tokenizer = load_tokenizer(EXAMPLES / model)
    lines = (EXAMPLES / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    ids: list[int] = []
    for index in torch.randperm(len(lines), generator=generator).tolist():
        ids += tokenizer(json.loads(lines[index])["text"]).input_ids
        if len(ids) >= ROWS * LENGTH:
            break
    return torch.tensor(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)


def copies(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return random segments that are each followed by themselves, for copy-llama."""
    segment = torch.randint(1, 512, (rows, length // 2), generator=generator)
    return torch.cat([segment, segment], dim=1)


def evaluation(model: str) -> tuple[torch.Tensor, int]:
    """Return windows of 512 tokens to score, and the first position that counts."""
    if model == "copy-llama":
        return copies(SCORED, 512, torch.Generator().manual_seed(1000)), 256
    ids = encode_text(load_tokenizer(EXAMPLES / model), read_text(EXAMPLES / "eval.txt"))
    return ids[: SCORED * 512].reshape(SCORED, 512), 1


def cases(tool: str, work: Path) -> Iterator[dict[str, Any]]:
    """Yield what the worker of a tool reads."""
    for model in MODELS:
        for scheme in SCHEMES.values():
            for method in methods(tool, model, scheme):
                for seed in (
                    SEEDS[:1] if method in FREE and scheme.activation != "tensor" else SEEDS
                ):
                    values = asdict(scheme)
                    del values["name"]
                    yield {
                        "name": case_name(tool, model, scheme.name, method, seed),
                        "model": str(work / model),
                        "calibration": str(calibration_file(work, model, seed)),
                        "method": method,
                        "seed": seed,
                        **values,
                    }


def case_name(tool: str, model: str, scheme: str, method: str, seed: int) -> str:
    """Return the name of the file of a case."""
    return f"{tool}-{model}-{scheme}-{method.replace(' ', '_')}-{seed}"
