"""What was written computes what the model in memory computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError, SlimError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, FakeQuantizeCalibrator, QuantConfig, load_model
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.tensors import from_numpy

Factory = Callable[..., Any]

MIX = {"*down*": "w8a16", "*o_proj": "w8a8_dynamic", "*.1.*.k_proj": "float", "*": "w8a8"}
GROUPED = {"is_lowbit": True, "open_outlier": False, "group_size": 32}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "w8a8": ({}, {}),
    "w8a8_tensor": ({"mm_tensor": True}, {}),
    "histogram": ({"act_method": 2}, {}),
    "dynamic": ({"is_dynamic": True}, {}),
    "w8a16": ({"a_bit": 16}, {}),
    "w8a16_asym": ({"a_bit": 16, "w_sym": False}, {}),
    "grouped": ({"a_bit": 16, "is_lowbit": True, "open_outlier": False, "group_size": 32}, {}),
    "fallback": ({}, {"disable_level": "L3"}),
    "mixed": ({}, {"mix_cfg": MIX}),
    "mix": ({"pdmix": True}, {}),
    "w4a16": ({"w_bit": 4, "a_bit": 16}, {}),
    "w4a16_asym": ({"w_bit": 4, "a_bit": 16, "w_sym": False}, {}),
    "w4a16_grouped": ({"w_bit": 4, "a_bit": 16, "w_sym": False, **GROUPED}, {}),
    "w4a8": ({"w_bit": 4, "is_dynamic": True, **GROUPED}, {}),
    "w4a8_mixed": (
        {"w_bit": 4, "is_dynamic": True, **GROUPED},
        {"mix_cfg": {"*self_attn*": "w8a8", "*0.mlp.down_proj": "w8a8_dynamic"}},
    ),
    "nf4": ({"w_bit": 4, "a_bit": 16, "w_method": "NF"}, {}),
}
NEW = ("mix", "w4a16", "w4a16_grouped", "w4a8", "nf4")
CASES = [
    *(("qwen2", torch.float32, name) for name in CONFIGS),
    *(("qwen2", torch.bfloat16, name) for name in ("w8a8", "w8a16", "dynamic", "mixed")),
    *(("qwen2", torch.float16, name) for name in ("w8a8", "mixed")),
    *(("llama", torch.bfloat16, name) for name in NEW),
    *(("qwen3_moe", torch.float32, name) for name in ("w4a16_grouped", "w4a8", "nf4")),
    *((family, torch.float32, "w8a8") for family in ("gpt2", "bloom", "qwen3_moe", "gemma")),
]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def write(
    tiny_model: Factory, tiny_calib: Any, path: Path, family: str, dtype: torch.dtype, name: str
) -> Any:
    """Quantize, save as ascendV1 beside a config.json, and return the fake-quant model."""
    model = tiny_model(family, dtype=dtype)
    config = model.config
    samples = [{"input_ids": ids, "attention_mask": mask} for ids, mask in tiny_calib]
    given, extra = CONFIGS[name]
    calibrator = Calibrator(model, QuantConfig(**{"mm_tensor": False, **given}), samples, **extra)
    calibrator.run()
    calibrator.save(str(path), save_type=["ascendV1"])
    config.save_pretrained(path)
    return calibrator.model


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: from_numpy(checkpoint.load(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize(("family", "dtype", "name"), CASES)
def test_reading_back(
    tiny_model: Factory,
    tiny_calib: Any,
    tiny_ids: Factory,
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    name: str,
) -> None:
    model = write(tiny_model, tiny_calib, tmp_path, family, dtype, name)
    if "mix_cfg" not in CONFIGS[name][1]:  # here k_proj alone is float, and engines refuse that
        assert verify_checkpoint(tmp_path).problems == ()
    ids = tiny_ids(24, seed=3, batch=2)
    expected = logits(model, ids)

    description = json.loads((tmp_path / "quant_model_description.json").read_text())
    again = FakeQuantizeCalibrator(
        tiny_model(family, dtype=dtype, seed=1),  # other weights: all must come from the files
        None,
        "cpu",
        description,
        stored_tensors(tmp_path),
    ).model
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            other = again.get_submodule(path)
            for buffer, value in module.named_buffers():
                assert torch.equal(value, other.get_buffer(buffer)), f"{path}.{buffer}"
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=1e-6)

    loaded = load_model(tmp_path)
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            other = loaded.get_submodule(path)
            assert torch.equal(module.codes, other.codes)
            assert torch.equal(module.weight_scale, other.weight_scale)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-5)
    else:  # load_model computes in float32 on the CPU, the model in memory in its dtype
        error = (logits(loaded, ids) - expected.float()).norm() / expected.float().norm()
        assert float(error) < 0.05


def test_a_model_open_in_another_dtype(
    tiny_model: Factory, tiny_calib: Any, tmp_path: Path
) -> None:
    write(tiny_model, tiny_calib, tmp_path, "qwen2", torch.bfloat16, "w8a8")
    description = json.loads((tmp_path / "quant_model_description.json").read_text())
    model = FakeQuantizeCalibrator(
        tiny_model("qwen2"), None, "cpu", description, stored_tensors(tmp_path)
    ).model
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    stored = QuantizedCheckpoint(tmp_path).tensors_of("model.layers.0.self_attn.q_proj")
    assert torch.equal(layer.deq_scale, torch.from_numpy(stored["deq_scale"]))


@pytest.fixture(scope="module")
def written(
    tiny_model: Factory, tiny_calib: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a description and the tensors that it describes."""
    path = tmp_path_factory.mktemp("written")
    write(tiny_model, tiny_calib, path, "qwen2", torch.float32, "w8a8")
    content = json.loads((path / "quant_model_description.json").read_text())
    return content, stored_tensors(path)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            ({"model": "llama"}, InvalidTypeError, "model"),
            ({"dev_id": "0"}, InvalidTypeError, "dev_id"),
            ({"dev_type": "cuda"}, InvalidValueError, "dev_type"),
            ({"description": []}, InvalidTypeError, "description"),
            ({"safetensor": []}, InvalidTypeError, "safetensor"),
            ({"safetensor": {"x": 1}}, InvalidTypeError, r"safetensor\['x'\]"),
            ({"description": {}}, InvalidValueError, r"no entry .*q_proj\.weight"),
        ],
    )
    def test_arguments(
        self,
        written: tuple[dict[str, Any], dict[str, torch.Tensor]],
        tiny_model: Factory,
        change: dict[str, Any],
        error: type[SlimError],
        says: str,
    ) -> None:
        given = {
            "model": tiny_model("qwen2"),
            "dev_id": None,
            "dev_type": "cpu",
            "description": written[0],
            "safetensor": written[1],
            **change,
        }
        with pytest.raises(error, match=says):
            FakeQuantizeCalibrator(**given)

    @pytest.mark.parametrize(
        ("local", "value", "says"),
        [
            ("deq_scale", None, "has no deq_scale"),
            ("weight", torch.zeros(64, 64), "must be int8"),
            ("input_scale", torch.ones(2), "must have shape"),
        ],
    )
    def test_tensors(
        self,
        written: tuple[dict[str, Any], dict[str, torch.Tensor]],
        tiny_model: Factory,
        local: str,
        value: torch.Tensor | None,
        says: str,
    ) -> None:
        layer = "model.layers.1.mlp.down_proj"
        tensors = dict(written[1])
        del tensors[f"{layer}.{local}"]
        if value is not None:
            tensors[f"{layer}.{local}"] = value
        with pytest.raises(FormatError, match=f"{layer}.*{says}"):
            FakeQuantizeCalibrator(tiny_model("qwen2"), None, "cpu", written[0], tensors)
