"""A rotated model is the same function, for every family that a rotation can pass through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import StructureError
from slim_core.recipe import Recipe, Rotate
from slim_ptq import quantize
from slim_ptq.inventory import take_inventory
from slim_ptq.load import load_model
from slim_ptq.rotation import Orthogonal, rotate_checkpoint

Factory = Callable[..., Any]

CPU = torch.device("cpu")
ROTATED = [
    *("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "glm"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"),
]
FLOAT = {"scheme": "float", "format": "float"}


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("heads", [True, False])
def test_the_logits_stay(
    saved_model: Callable[..., Path],
    tiny_ids: Factory,
    tmp_path: Path,
    family: str,
    heads: bool,
) -> None:
    source = saved_model(family)
    recipe = Recipe.build(**FLOAT, rotate={"heads": heads})
    quantize(source, tmp_path / "out", recipe=recipe)
    expected, found = logits(source, tiny_ids()), logits(tmp_path / "out", tiny_ids())
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    changed = [
        name
        for name in after.tensors
        if name not in before.tensors or not np.array_equal(before.load(name), after.load(name))
    ]
    assert any("embed" in name for name in changed)
    norms = [
        n for n in after.tensors if n.endswith(("input_layernorm.weight", "model.norm.weight"))
    ]
    for name in norms:
        values = after.load(name)
        assert np.array_equal(values, np.full_like(values, values[0])), name


def test_a_tied_head_is_untied(tiny_model: Factory, tiny_ids: Factory, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", recipe=Recipe.build(**FLOAT, rotate={}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    expected, found = logits(tmp_path / "in", tiny_ids()), logits(tmp_path / "out", tiny_ids())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_outliers_are_spread_and_the_quantized_model_is_better(
    tiny_model: Factory, plant_outliers: Callable[..., None], tiny_ids: Factory, tmp_path: Path
) -> None:
    """Four-bit activations with outlier channels: what rotations were made for."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        plant_outliers(
            layer.input_layernorm,
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [3, 40],
            30.0,
        )
        plant_outliers(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], [7], 30.0)
    model.save_pretrained(tmp_path / "in")
    ids = tiny_ids(length=48, seed=5)
    errors = {}
    with torch.no_grad():
        expected = load_model(tmp_path / "in")(ids).logits
        for name, rotate in (("plain", None), ("rotated", {})):
            recipe = Recipe.build(scheme="w4a4_dynamic", rotate=rotate)
            quantize(tmp_path / "in", tmp_path / name, recipe=recipe)
            found = load_model(tmp_path / name)(ids).logits
            errors[name] = float((found - expected).norm() / expected.norm())
    assert errors["rotated"] < 0.6 * errors["plain"]


def test_both_pipelines_write_the_rotated_model(
    saved_model: Callable[..., Path], tiny_ids: Factory, tmp_path: Path
) -> None:
    source = saved_model("qwen2")
    data = tmp_path / "calib.jsonl"
    rows = [tiny_ids(16, seed=seed)[0].tolist() for seed in range(4)]
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    with torch.no_grad():
        expected = load_model(source)(tiny_ids()).logits
        for scheme in ("w8a8", "w8a16"):
            recipe = Recipe.build(scheme=scheme, rotate={"seed": 1})
            quantize(source, tmp_path / scheme, recipe=recipe, calibration=data, length=16)
            found = load_model(tmp_path / scheme)(tiny_ids()).logits
            assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(
    ("family", "says"),
    [("bloom", "one norm"), ("gpt2", "RMSNorm"), ("gemma2", "cannot be rotated")],
)
def test_models_that_no_rotation_passes_through(
    saved_model: Callable[..., Path], family: str, says: str
) -> None:
    checkpoint = open_checkpoint(saved_model(family))
    with pytest.raises(StructureError, match=says):
        rotate_checkpoint(checkpoint, take_inventory(checkpoint), Rotate(), CPU)


def test_the_rotation_is_that_of_the_seed(saved_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(saved_model("llama"))
    inventory = take_inventory(checkpoint)
    name = "model.embed_tokens.weight"
    for seed in (0, 1):
        rotated = rotate_checkpoint(checkpoint, inventory, Rotate(seed=seed), CPU).load(name)
        by_hand = checkpoint.load(name).astype(np.float64) @ Orthogonal(64, seed).matrix().numpy()
        np.testing.assert_allclose(rotated, by_hand, rtol=1e-5, atol=1e-6)
