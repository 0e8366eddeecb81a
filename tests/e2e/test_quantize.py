"""slim-ptq from the command line to files that independent readers take."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

SCHEMES = {"w8a8": 1.01, "w8a8_dynamic": 1.01, "w8a16": 1.002, "w8a16_g32": 1.002}
PARAMETERS = {
    "W8A8": {
        "weight": "I8",
        "weight_scale": "F32",
        "weight_offset": "F32",
        "input_scale": "F32",
        "input_offset": "F32",
        "quant_bias": "I32",
        "deq_scale": "F32",  # the example model is bfloat16
    },
    "W8A8_DYNAMIC": {"weight": "I8", "weight_scale": "F32", "weight_offset": "F32"},
    "W8A16": {"weight": "I8", "weight_scale": "F32", "weight_offset": "F32"},
}


@pytest.fixture(scope="module", params=list(SCHEMES))
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: Any, run: Any, examples: Path
) -> tuple[str, Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "model"
    model, calib, text = examples / "tiny-llama", examples / "calib.jsonl", examples / "eval.txt"
    command = ("slim-ptq", "quantize", model, out, "--scheme", request.param, "--json")
    done = run(*command, "--calib", calib, "--eval", text, "--samples", 16)
    return request.param, out, json.loads(done.stdout)


def test_quality_is_within_its_bound(quantized: tuple[str, Path, dict[str, Any]]) -> None:
    scheme, _, report = quantized
    assert report["perplexity_after"] / report["perplexity_before"] < SCHEMES[scheme]


def test_every_stored_tensor_is_described_and_typed(
    quantized: tuple[str, Path, dict[str, Any]],
) -> None:
    _, out, _ = quantized
    description = json.loads((out / "quant_model_description.json").read_text())
    files = list(out.glob("*.safetensors"))
    assert len(files) == 1
    with safe_open(files[0], framework="numpy") as stored:
        names = set(stored.keys())
        assert names <= description.keys()
        for name in names:
            kind = description[name]
            if kind != "FLOAT":
                local = name.rpartition(".")[2]
                assert stored.get_slice(name).get_dtype() == PARAMETERS[kind][local]
    assert description["version"] == "1.0.0"
    assert isinstance(description["group_size"], int)
    for index in range(4):
        block = f"model.layers.{index}"
        fused = {description[f"{block}.self_attn.{part}_proj.weight"] for part in "qkv"}
        assert len(fused) == 1
    assert description["lm_head.weight"] == description["model.embed_tokens.weight"] == "FLOAT"


def test_directory_is_complete_and_private(quantized: tuple[str, Path, dict[str, Any]]) -> None:
    _, out, _ = quantized
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "slim_report.html", "slim_recipe.yaml"} <= names
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not any(name.endswith("index.json") for name in names)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    for path in out.iterdir():
        expected = 0o400 if path.suffix == ".safetensors" else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected


def test_verify_finds_it_sound_and_damage_not(
    quantized: tuple[str, Path, dict[str, Any]], run: Any, tmp_path: Path
) -> None:
    _, out, _ = quantized
    assert "sound" in run("slim-ptq", "verify", out).stdout
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in out.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = damaged / "quant_model_description.json"
    description = json.loads(file.read_text())
    del description["model.layers.0.mlp.up_proj.weight"]
    file.write_text(json.dumps(description))
    done = run("slim-ptq", "verify", damaged, expect=1)
    assert "model.layers.0.mlp.up_proj" in done.stdout


def test_weights_are_the_rounded_originals(
    quantized: tuple[str, Path, dict[str, Any]], examples: Path
) -> None:
    """Decode with nothing but safetensors and numpy, as an engine would."""
    import ml_dtypes  # noqa: F401  (numpy learns bfloat16)

    _, out, _ = quantized
    name = "model.layers.2.mlp.down_proj"
    with safe_open(next(out.glob("*.safetensors")), framework="numpy") as stored:
        codes = stored.get_tensor(f"{name}.weight").astype(np.float32)
        scale = stored.get_tensor(f"{name}.weight_scale")
        offset = stored.get_tensor(f"{name}.weight_offset")
    with safe_open(examples / "tiny-llama" / "model.safetensors", framework="numpy") as source:
        weight = source.get_tensor(f"{name}.weight").astype(np.float32)
    groups = scale.shape[1]
    shape = (codes.shape[0], groups, -1)
    decoded = (codes.reshape(shape) - offset[..., None]) * scale[..., None]
    error = np.abs(decoded - weight.reshape(shape))
    assert (error <= scale[..., None] * 0.5001).all()


def test_dequantized_model_loads_in_transformers(
    quantized: tuple[str, Path, dict[str, Any]], run: Any, tmp_path: Path, examples: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _, out, _ = quantized
    run("slim-ptq", "dequantize", out, tmp_path / "float")
    ids = torch.arange(1, 33).reshape(1, -1)
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (tmp_path / "float", examples / "tiny-llama")
    ]
    assert torch.nn.functional.cosine_similarity(*logits, dim=-1).min() > 0.995
