"""Sparse models: what is stored, that it loads as it ran, and that both faces agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from slim_core.errors import PlanError
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, FakeQuantizeCalibrator, QuantConfig, quantize
from slim_ptq.load import load_model

Factory = Callable[..., Any]
Samples = list[list[torch.Tensor]]
Tensors = dict[str, np.ndarray]

DOWN = "model.layers.0.mlp.down_proj"


def calibrated(model: Any, samples: Samples, path: Path, **given: Any) -> tuple[Tensors, Any]:
    """Quantize and save; returns the tensors and the description."""
    config = QuantConfig(**{"w_bit": 4, "a_bit": 8, "mm_tensor": False, **given})
    calibrator = Calibrator(model, config, calib_data=samples)
    calibrator.run()
    calibrator.save(str(path), save_type=["safe_tensor"])
    description = json.loads((path / "quant_model_description_w8a8s.json").read_text())
    return load_file(path / "quant_model_weight_w8a8s.safetensors"), description


def test_rows(tiny_model: Factory, tiny_calib: Samples, tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = model.get_submodule(DOWN).weight.detach().numpy().copy()
    tensors, description = calibrated(model, tiny_calib, tmp_path, is_lowbit=True, fraction=0.05)
    ordered = -np.sort(-np.abs(weight), axis=1)
    step = (ordered[:, int(0.05 * weight.shape[1]) - 1] / np.float32(7))[:, None]
    codes = np.clip(np.round(weight / step), -128, 127).astype(np.int8)
    assert np.array_equal(tensors[f"{DOWN}.weight"], codes)
    assert {name for name in tensors if name.startswith(DOWN)} == {
        f"{DOWN}.{local}"
        for local in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
    }
    deq_scale = (tensors[f"{DOWN}.input_scale"] * step[:, 0]).astype(np.float32)
    assert np.array_equal(tensors[f"{DOWN}.deq_scale"], deq_scale.view(np.uint32).astype(np.int64))
    assert description["model_quant_type"] == "W8A8S"
    assert {description[f"{DOWN}.{local}"] for local in ("weight", "deq_scale")} == {"W8A8S"}
    assert description["lm_head.weight"] == "FLOAT"


def test_the_whole_weight(tiny_model: Factory, tiny_calib: Samples, tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = model.get_submodule(DOWN).weight.detach().numpy().copy()
    tensors, _ = calibrated(model, tiny_calib, tmp_path, co_sparse=True, fraction=0.05)
    size = np.abs(weight)
    threshold = -np.sort(-size, axis=None)[int(0.05 * size.size) - 1]
    inlier = np.where(size <= threshold, size, 0).max(axis=1, keepdims=True)
    codes = np.clip(np.round(weight / (inlier / np.float32(7))), -127, 127).astype(np.int8)
    assert np.array_equal(tensors[f"{DOWN}.weight"], codes)


@pytest.mark.parametrize(
    "given",
    [
        {"is_lowbit": True},
        {"is_lowbit": True, "mm_tensor": True},
        {"is_lowbit": True, "use_sigma": True, "sigma_factor": 3, "act_method": 2},
        {"is_lowbit": True, "nonuniform": True},
        {"co_sparse": True, "act_method": 3},
        {"co_sparse": True, "mm_tensor": True},
        {"co_sparse": True, "nonuniform": True, "fraction": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_files_compute_what_the_model_computed(
    tiny_model: Factory,
    tiny_calib: Samples,
    tiny_ids: Callable[..., torch.Tensor],
    tmp_path: Path,
    family: str,
    given: dict[str, Any],
) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        ids = tiny_ids()
        float_logits = model(ids).logits
        tensors, description = calibrated(model, tiny_calib, tmp_path, **given)
        logits = model(ids).logits
        loaded = {name: torch.from_numpy(value) for name, value in tensors.items()}
        again = FakeQuantizeCalibrator(tiny_model(family), None, "cpu", description, loaded).model
        # The weight scale is not stored: deq_scale / input_scale loses its last bit.
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-3, atol=1e-3)
    error = float((logits - float_logits).norm() / float_logits.norm())
    assert 0.0 < error < 0.5  # each weight of these random models is off by a tenth


def test_levels_that_fall_back_are_stored_in_floating_point(
    tiny_model: Factory, tiny_calib: Samples, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    config = QuantConfig(w_bit=4, is_lowbit=True, mm_tensor=False)
    calibrator = Calibrator(model, config, calib_data=tiny_calib, disable_level="L2")
    calibrator.run()
    calibrator.save(str(tmp_path))
    types = json.loads((tmp_path / "quant_model_description_w8a8s.json").read_text())
    stored = load_file(tmp_path / "quant_model_weight_w8a8s.safetensors")
    floats = {n for n, kind in types.items() if kind == "FLOAT" and n.endswith("_proj.weight")}
    assert len(floats) == 2
    assert all(stored[name].dtype == np.float32 for name in floats)


def test_the_modern_interface_gives_the_same_integers(
    saved_model: Callable[..., Path],
    tiny_model: Factory,
    tiny_ids: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    rows = [tiny_ids(16, seed=seed)[0].tolist() for seed in range(4)]
    data = tmp_path / "calib.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: w8a8s\nmethod: {name: sparse, fraction: 0.05}\nformat: safe_tensor\n"
    )
    source = saved_model("llama")
    report = quantize(source, tmp_path / "out", recipe=recipe, calibration=data, length=16)
    assert verify_checkpoint(tmp_path / "out").sound
    modern = load_file(tmp_path / "out" / "quant_model_weight_w8a8s.safetensors")
    model = tiny_model("llama")
    samples = [[torch.tensor([row])] for row in rows]
    classic, _ = calibrated(model, samples, tmp_path / "c", is_lowbit=True, fraction=0.05)
    for name, codes in modern.items():
        if codes.dtype == np.int8:
            assert np.array_equal(codes, classic[name]), name
    quantized = [layer for layer in report.layers if not layer.is_float]
    assert all("of the codes have 4 bits" in layer.notes[0] for layer in quantized)
    with torch.no_grad():
        ids = tiny_ids()
        found = load_model(tmp_path / "out")(ids).logits
        expected = load_model(source)(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scheme: w8a8s\nmethod: minmax\n", "method sparse"),
        ("scheme: w8a8\nmethod: sparse\n", "w8a8s only"),
        ("scheme: w8a8s\nmethod: {name: sparse, fraction: 0.2}\n", "fraction"),
        ("scheme: w8a8s\nmethod: {name: sparse, ratio: 0.2}\n", "no option 'ratio'"),
    ],
)
def test_recipes_that_cannot_be(
    saved_model: Callable[..., Path],
    tiny_ids: Callable[..., torch.Tensor],
    tmp_path: Path,
    text: str,
    says: str,
) -> None:
    data = tmp_path / "calib.jsonl"
    data.write_text(json.dumps({"input_ids": tiny_ids(16)[0].tolist()}))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(PlanError, match=says):
        quantize(
            saved_model("llama"),
            tmp_path / "out",
            recipe=tmp_path / "recipe.yaml",
            calibration=data,
        )
    assert not (tmp_path / "out").exists()
